"""Models side by side: numbers worked out by hand, flips with their texts, refusals that name the field."""

import json
from dataclasses import replace
from typing import Any

import pytest

from evaluation import statistics
from evaluation.comparison import Answer, ItemText, Subject, TokenAnswers, colour, compare
from evaluation.harness.result import BenchmarkResult, ScoreRow
from evaluation.pages.comparison_page import name_tone, render_comparison
from evaluation.statistics import adjust_holm

PROFILE = {"config": {"limit": None, "num_fewshot": 0}, "harness_version": "0.4.13"}


def result(scores: str, **profile: Any) -> BenchmarkResult:
    """Return a benchmark's result of items 0 and 1, as in "0110"."""
    items = {("task", str(n)): float(score) for n, score in enumerate(scores)}
    row = ScoreRow(
        benchmark="mmlu", task="mmlu", metric="acc", filter="none", value=sum(items.values()) / len(items), stderr=None,
        n=len(items), task_version=1, num_fewshot=0, decides=True, harness_version="0.4.13",
    )  # fmt: skip
    return BenchmarkResult(benchmark="mmlu", scores=(row,), items=items, profile=PROFILE | profile)


def subject(name: str, scores: str, rewards: tuple[float, ...] = (), **more: Any) -> Subject:
    found = result(scores)
    texts = {key: ItemText(f"{key[1]}?", f"{name} says {key[1]}", "right") for key in found.items}
    answers = {f"row{n}": Answer("user: hello", (f"{name} answers {n}",), (n == 0,)) for n in range(len(rewards))}
    return Subject(
        name=name, ref=f"train/{name}", results={"mmlu": found}, texts={"mmlu": texts}, answers=answers,
        rewards={f"row{n}": reward for n, reward in enumerate(rewards)}, **more,
    )  # fmt: skip


def test_scores_differences_and_flips_of_two_models() -> None:
    found = compare([subject("a", "0011"), subject("b", "0110")])
    (measure,) = found.benchmarks
    assert [level.value for level in measure.levels] == [0.5, 0.5]
    (difference,) = measure.differences
    assert (difference.n, difference.won, difference.lost, difference.difference) == (4, 1, 1, 0.0)
    assert (difference.low, difference.high) == statistics.tango_interval(1, 1, n=4, confidence=0.95)
    assert (difference.p_value, difference.p_adjusted) == pytest.approx((1.0, 1.0))
    assert [(flip.doc_id, flip.won, flip.reference_answer, flip.answer) for flip in found.flips] == [
        ("1", True, "a says 1", "b says 1"),
        ("3", False, "a says 3", "b says 3"),
    ]
    assert found.reward is None and found.samples == ()
    assert "held-out rewards: of none of them, so not compared" in found.not_compared


def test_rewards_are_paired_by_prompt_and_p_values_adjusted_over_all_that_is_shown() -> None:
    models = [
        subject("a", "0011", (0.0, 1.0, 2.0)), subject("b", "1111", (1.0, 2.5, 3.0)), subject("c", "0000", (0.0, 1.0, 2.0)),
    ]  # fmt: skip
    found = compare(models)
    assert found.reward and [level.value for level in found.reward.levels] == pytest.approx([1.0, 6.5 / 3, 1.0])
    gain, none = found.reward.differences
    assert gain.difference == pytest.approx((1.0 + 1.5 + 1.0) / 3)
    test = statistics.paired_t([1.0, 1.5, 1.0], alpha=0.025)
    assert (gain.low, gain.high, gain.p_value) == pytest.approx((test.low, test.high, 2 * test.p_value))
    assert (none.low, none.high, none.p_value, none.detectable) == (0.0, 0.0, 1.0, None), "no spread, no claim"
    measures = [*found.benchmarks, found.reward, found.length]
    shown = [difference for measure in measures if measure for difference in measure.differences]
    assert [d.p_adjusted for d in shown] == pytest.approx(list(adjust_holm([d.p_value for d in shown])))
    assert found.truncated == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found.samples[-1].rewards == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"harness_version": "0.4.14"}, "harness_version"),
        ({"config": {"limit": 8, "num_fewshot": 0}}, r"config\.limit"),
        ({"config": {"limit": None, "num_fewshot": 5}}, r"config\.num_fewshot"),
    ],
)
def test_scores_of_different_profiles_are_an_error_that_names_the_field(changes: dict[str, Any], field: str) -> None:
    other = replace(subject("b", "0110"), results={"mmlu": result("0110", **changes)})
    with pytest.raises(ValueError, match=rf"scores of different profiles are never compared; .*{field}"):
        compare([subject("a", "0011"), other])


def test_other_prompts_are_an_error_and_other_benchmarks_are_named() -> None:
    with pytest.raises(ValueError, match=r"the held-out prompts must be the same; 1 are of only one of a and b"):
        compare([subject("a", "01", (1.0, 2.0)), subject("b", "01", (1.0, 2.0, 3.0))])
    lone = replace(subject("b", "01"), results={"bbh": replace(result("01"), benchmark="bbh")})
    found = compare([subject("a", "01"), lone])
    assert found.benchmarks == ()
    assert found.not_compared[:2] == ("mmlu: only of a, so not compared", "bbh: only of b, so not compared")


def test_settings_that_differ_data_and_cost_stand_beside_each_other() -> None:
    settings = {"train.lambda_": 0.5, "train.seed": 1}
    found = compare([
        subject("a", "01", settings=settings, rows=frozenset("xyz"), data={"rows": 3}, cost={"train": 4.0}),
        subject("b", "01", settings=settings | {"train.lambda_": 0.2}, rows=frozenset("yzw"), data={"rows": 3}, cost={}),
    ])  # fmt: skip
    assert [(row.name, row.values) for row in found.settings] == [("train.lambda_", (0.5, 0.2))]
    (rows,) = found.overlaps
    assert (rows.both, rows.only_reference, rows.only_subject) == (2, 1, 1)
    assert found.cost[0].values == (4.0, None)
    outside = subject("c", "01")  # nothing here made it, so it has no settings to differ in
    assert [row.values for row in compare([subject("a", "01", settings=settings), outside]).settings] == []


def test_words_that_only_one_answer_has_are_marked_and_the_text_stays_whole() -> None:
    texts = ("Paris is the capital.", "Paris is  a city.\nYes.", "")
    spans = colour(texts)
    assert ["".join(span.text for span in own) for own in spans] == list(texts)
    assert [span.text for span in spans[0] if span.own and span.text.strip()] == ["the capital."]
    assert not [span for span in spans[0] if span.own and "Paris" in span.text]
    assert spans[2] == ()


def test_tokens_are_coloured_by_what_both_models_say_and_words_where_they_were_not_asked() -> None:
    models = [subject("a", "01", (0.0, 1.0)), subject("b", "01", (1.0, 3.0)), subject("c", "01", (1.0, 0.0))]
    said = [(" b", -1.0, -0.875), (" answers", -2.0, -4.5), (" 1", -1.0, -1.0), ("<end>", -3.0, -0.5)]
    models[1] = replace(models[1], tokens={"row1": TokenAnswers(reference=said[:2], own=said)})
    found = compare(models)
    (sample,) = (s for s in found.samples if any(span.logp is not None for own in s.answers for span in own))
    reference, own, third = sample.answers
    assert [span.difference for span in own] == [0.125, -2.5, 0.0, 2.5] and [span.text for span in reference] == [
        " b",
        " answers",
    ]
    assert [name_tone(span) for span in own] == ["up1", "down3", "", "up3"]
    assert all(span.logp is None for span in third) and any(span.own for span in third)
    page = render_comparison(found, tuple(models), links={})
    assert 'title="−2.50 nats: log-probability −2.00 under a, −4.50 under b"> answers</span>' in page
    assert 'class="tok up3"' in page and "&lt;end&gt;" in page and 'id="key"' in page
    assert 'id="key"' not in render_comparison(compare([models[0], models[2]]), (models[0], models[2]), links={})


def test_the_page_escapes_what_models_wrote_and_holds_all_parts() -> None:
    attack = "</script><script>alert(1)</script>"
    models = [subject("a", "0011", (0.0, 1.0)), subject("b", "0110", (1.0, 3.0))]
    models[1] = replace(
        models[1], texts={"mmlu": {k: replace(t, answer=attack) for k, t in models[1].texts["mmlu"].items()}}
    )
    page = render_comparison(compare(models), tuple(models), links={"MLflow run": "javascript:alert(1)"})
    assert attack not in page and "&lt;/script&gt;&lt;script&gt;" in page
    assert 'href="javascript' not in page
    charts = json.loads(page.split('<script type="application/json" id="charts">')[1].split("</script>")[0])
    assert charts.keys() == {"benchmarks", "reward", "rewards", "lengths"}
    assert "mmlu: b wins 1 item" in page and "mmlu: b loses 1 item" in page
    assert page == render_comparison(compare(models), tuple(models), links={"MLflow run": "javascript:alert(1)"})


def test_one_model_is_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="got 1 models, expected at least 2"):
        compare([subject("a", "01")])
