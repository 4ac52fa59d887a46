"""Models side by side: numbers worked out by hand, flips with their texts, refusals that name the field."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evaluation import statistics
from evaluation.comparison import (
    Answer,
    Difference,
    ItemText,
    Subject,
    TokenAnswers,
    Verdicts,
    colour,
    compare,
    rate_verdicts,
)
from evaluation.harness.result import BenchmarkResult, ScoreRow
from evaluation.judges.judge import Judgement, Pair, Reply
from evaluation.judges.scores import STRONG_WEIGHT, gather, win_rate
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
    answers = {f"row{n}": Answer(f"user: hello {n}", (f"{name} answers {n}",), (n == 0,)) for n in range(len(rewards))}
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


def test_rows_of_one_prompt_count_once() -> None:
    rewards = ((0.0, 0.0, 0.0, 1.0, 1.0, 2.0), (1.0, 1.0, 1.0, 1.5, 1.5, 2.0))
    models = [subject(name, "01", own) for name, own in zip("ab", rewards, strict=True)]
    asked = ("one", "one", "one", "two", "two", "three")
    for model in models:
        assert isinstance(model.answers, dict)
        for answer, (row, prompt) in zip(
            [*model.answers.values()], zip(model.answers, asked, strict=True), strict=True
        ):
            model.answers[row] = replace(answer, prompt=prompt)
    found = compare(models)
    assert found.reward and found.reward.n == 3
    (gain,) = found.reward.differences
    test = statistics.paired_t([1.0, 0.5, 0.0], alpha=0.025)
    assert (gain.n, gain.difference, gain.low, gain.high) == pytest.approx((3, 0.5, test.low, test.high))


def test_tasks_of_a_benchmark_are_strata() -> None:
    def scored(scores: tuple[float, ...]) -> Subject:
        items = {(f"task{n // 3}", str(n)): score for n, score in enumerate(scores)}
        texts = {key: ItemText("?", "a", "b") for key in items}
        found = {"mmlu": replace(result("0"), items=items)}
        return Subject(name=str(scores), ref="train/a", results=found, texts={"mmlu": texts})

    def compared(first: tuple[float, ...], second: tuple[float, ...]) -> Difference:
        (measure,) = compare([scored(first), scored(second)]).benchmarks
        return measure.differences[0]

    # a gain of 1 on every item of one task and none on the other's: no spread within tasks
    whole = compared((0.0, 0.0, 0.0, 1.0, 1.0, 1.0), (1.0,) * 6)
    assert (whole.stratified_low, whole.stratified_high) == (0.5, 0.5)
    assert (whole.low, whole.high) == statistics.tango_interval(3, 0, n=6, confidence=0.95)
    part = compared((0.0, 0.2, 0.4, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.1, 0.0, 0.2))
    test = statistics.stratified_t([1.0, 0.8, 0.6, 0.1, 0.0, 0.2], [0, 0, 0, 1, 1, 1], alpha=0.025)
    assert part.method == "t within tasks" and (part.low, part.high) == (test.low, test.high)


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
    with pytest.raises(ValueError, match=r"heldout_reward: the prompts must be the same; 1 are of only one of a and b"):
        compare([subject("a", "01", (1.0, 2.0)), subject("b", "01", (1.0, 2.0, 3.0))])
    lone = replace(subject("b", "01"), results={"bbh": replace(result("01"), benchmark="bbh")})
    found = compare([subject("a", "01"), lone])
    assert found.benchmarks == ()
    assert found.not_compared[:2] == ("mmlu: only of a, so not compared", "bbh: only of b, so not compared")


def judged(name: str, margins: dict[str, tuple[int, ...]], **profile: Any) -> Subject:
    """Return a model with what a judge said of its answers, by question."""
    verdicts = Verdicts("win rate against base, judge j@1", {"prompt": "p"} | profile, margins)
    return subject(name, "01", verdicts={"arena_hard": verdicts})


def test_win_rates_are_paired_by_question_and_weighed_as_arena_hard_does() -> None:
    """By hand: a (3 + 1 + 0 + 0) / 6 and b (1 + 1 + 1 + 0) / 6 over x (a: >>, >; b: >, >) and y (a: <, <; b: >, <<)."""
    a = judged("a", {"x": (2, 1), "y": (-1, -1), "only_a": (2, 2)})
    b = judged("b", {"y": (1, -2), "x": (1, 1), "only_b": (1, 1)})
    (measure,) = compare([a, b]).judges
    assert (measure.what, measure.unit, measure.n) == ("arena_hard", "questions", 2)
    assert [level.value for level in measure.levels] == pytest.approx([4 / 6, 3 / 6])
    (difference,) = measure.differences
    assert difference.difference == pytest.approx(-1 / 6)
    assert (difference.won, difference.lost, difference.n) == (1, 0, 2), "on x both have all, on y b has a quarter"
    assert measure.detail == "win rate against base, judge j@1; without 2 that lack a verdict on some model"


def draw_verdicts(n: int, seed: int, chance: tuple[float, ...]) -> list[tuple[int, int]]:
    drawn = np.random.default_rng(seed).choice([-2, -1, 0, 1, 2], size=(n, 2), p=chance)
    return [(int(first), int(second)) for first, second in drawn]


def test_a_level_is_the_judges_own_and_a_difference_has_the_spread_of_a_paired_bootstrap() -> None:
    n = 300
    ours, theirs = draw_verdicts(n, 1, (0.1, 0.2, 0.2, 0.3, 0.2)), draw_verdicts(n, 2, (0.2, 0.3, 0.1, 0.3, 0.1))
    ids = [f"q{k:04d}" for k in range(n)]
    (measure,) = compare(
        [judged("a", dict(zip(ids, theirs, strict=True))), judged("b", dict(zip(ids, ours, strict=True)))]
    ).judges
    reply = Reply("", "stop", "j", 1, 1)
    made = [
        Judgement(Pair(name, "g", name, "?", "", ""), order, 0, [], margin, [reply])
        for name, both in zip(ids, ours, strict=True)
        for order, margin in zip(("ours_first", "theirs_first"), both, strict=True)
    ]
    own = win_rate(gather(made), strong_weight=STRONG_WEIGHT)
    level, (difference,) = measure.levels[1], measure.differences
    assert (level.value, level.low, level.high) == pytest.approx((own.value, own.low, own.high))
    assert difference.difference == pytest.approx(level.value - measure.levels[0].value)

    def rates(drawn: Any) -> float:
        return rate(ours, drawn) - rate(theirs, drawn)

    def rate(margins: list[tuple[int, int]], drawn: Any) -> float:
        margin = np.array(margins)[drawn]
        weight = np.where(np.abs(margin) == 2, STRONG_WEIGHT, 1)
        return float((weight * (np.sign(margin) + 1) / 2).sum() / weight.sum())

    draw = np.random.default_rng(0)
    resampled = [rates(draw.integers(n, size=n)) for _ in range(2000)]
    assert (difference.low, difference.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.01)


def test_equal_weights_leave_scores_as_they_are() -> None:
    _, score_Q, linear_Q = rate_verdicts([(2, 2), (-2, -2), (2, -2)])
    assert score_Q.tolist() == linear_Q.tolist() == [1.0, 0.0, 0.5]


def test_verdicts_of_another_judge_or_on_no_question_in_common_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"arena_hard: scores of different profiles .* of b and a, prompt is .q. and .p."
    ):
        compare([judged("a", {"x": (1, 1)}), judged("b", {"x": (1, 1)}, prompt="q")])
    with pytest.raises(ValueError, match="arena_hard: none of 2 questions has verdicts of every model"):
        compare([judged("a", {"x": (1, 1)}), judged("b", {"y": (1, 1)})])


def test_rewards_of_prompt_sets_stand_beside_the_held_out_and_share_the_adjustment() -> None:
    gains = {"row0": 0.5, "row1": 1.5, "row2": 1.0}
    models = [subject("a", "0011", (0.0, 1.0)), subject("b", "1111", (1.0, 2.5))]
    models[0] = replace(models[0], sets={"hha_helpful": dict.fromkeys(gains, 0.0), "offsetbias": {"row0": 1.0}})
    models[1] = replace(models[1], sets={"hha_helpful": gains})
    found = compare(models)
    (measure,) = found.alignment
    test = statistics.paired_t([*gains.values()], alpha=0.025)
    assert (measure.what, measure.unit, measure.n, measure.levels[1].value) == ("hha_helpful", "prompts", 3, 1.0)
    (difference,) = measure.differences
    assert (difference.low, difference.high, difference.p_value) == pytest.approx(
        (test.low, test.high, 2 * test.p_value)
    )
    shown = [difference for measure in found.measures for difference in measure.differences]
    assert [d.what for d in shown] == ["mmlu", "hha_helpful", "heldout_reward", "answer_characters"]
    assert [d.p_adjusted for d in shown] == pytest.approx(list(adjust_holm([d.p_value for d in shown])))
    assert "offsetbias: only of a, so not compared" in found.not_compared
    page = render_comparison(found, tuple(models), links={})
    charts = json.loads(page.split('<script type="application/json" id="charts">')[1].split("</script>")[0])
    assert charts["reward"]["layout"]["yaxis"]["ticktext"] == ["hha_helpful", "held-out reward"]


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
