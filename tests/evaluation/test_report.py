"""The report page: complete, honest about what is absent, and safe against what models and data write."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.alignment import AlignmentResult, Answers, measure
from evaluation.config import GatePolicy
from evaluation.gate.decide import Evidence, decide
from evaluation.gate.verdict import Noise, Verdict
from evaluation.harness.contamination import Contamination, Hit, Level
from evaluation.harness.result import BenchmarkResult, ScoreRow
from evaluation.pages.report import (
    CURVES,
    ReportData,
    RewardPair,
    SampleAnswer,
    StepRow,
    TrainingAnswer,
    doubt_reward,
    lay_out_answers,
    render_report,
    show_seconds,
)
from evaluation.reward_bias import Accuracy, RewardBias

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} <b>bold</b> & \u2028 \"'"


def make_verdict(gain_P: np.ndarray, *, names: tuple[str, ...] = ("mmlu", "bbh"), **policy: Any) -> Verdict:
    right = np.r_[np.ones(200), np.zeros(200)]
    worse = np.r_[np.zeros(12), np.ones(188 + 10), np.zeros(190)]

    def results(correct_N: np.ndarray) -> list[BenchmarkResult]:
        items = {("task", f"{i:03d}"): float(value) for i, value in enumerate(correct_N)}
        return [BenchmarkResult(benchmark=name, scores=(), items=items, profile={}) for name in names]

    rows = [f"{i:032x}" for i in range(len(gain_P))]
    lengths = {row: 100.0 + i % 7 for i, row in enumerate(rows)}
    gained = {row: 1.0 + float(gain) for row, gain in zip(rows, gain_P, strict=True)}
    return decide(
        GatePolicy(margins=dict.fromkeys(names, 0.05), **policy),
        challenger=Evidence(results(worse), gained, lengths),
        champion=Evidence(results(right), dict.fromkeys(rows, 1.0), lengths),
        same_model=False,
        inputs={"challenger": "c" * 64},
        noise={"bbh": [Noise(varied="batch size", runs=2, flip_rate=0.0125, max_difference=0.0025)]},
    )


def score(benchmark: str, value: float, *, filter: str = "none", decides: bool = True) -> ScoreRow:
    return ScoreRow(
        benchmark=benchmark,
        task=f"{benchmark}_task",
        metric="acc",
        filter=filter,
        value=value,
        stderr=0.025,
        n=400,
        task_version=1,
        num_fewshot=0,
        decides=decides,
        harness_version="0.4.13",
    )


def make_contamination(benchmark: str, *, hits: int) -> Contamination:
    level, clean = Level(items=400, value=0.5, stderr=0.025), Level(items=400 - hits, value=0.4975, stderr=0.0251)
    samples = tuple(Hit(task=f"{benchmark}_task", doc_id=str(i), ngram=HOSTILE, row_id="d" * 32) for i in range(hits))
    return Contamination(
        benchmark=benchmark, n=13, items=400, short=7, hits=hits, challenger=level, champion=level, challenger_clean=clean,
        champion_clean=clean, samples=samples,
    )  # fmt: skip


def make_alignment(name: str) -> AlignmentResult:
    """Both models' rewards on four prompts: gains of 1, 0, 3 and -1."""

    def answers(rewards: list[float], characters: int) -> Answers:
        rows = [f"{n}" for n in range(len(rewards))]
        texts = {row: [characters] for row in rows}
        return Answers({row: [reward] for row, reward in zip(rows, rewards, strict=True)}, texts, 0.25, 0.0, dropped=3)

    return measure(name, answers([2.0, 2.0, 3.0, 4.0], 120), answers([1.0, 2.0, 0.0, 5.0], 80))


def make_reward_test() -> RewardBias:
    groups = tuple(
        Accuracy(group=group, n=17, accuracy=right, low=right - 0.2, high=right + 0.2, length_baseline=0.1)
        for group, right in (("all", 0.45), ("length bias", 0.3), (HOSTILE, 0.6))
    )
    return RewardBias(
        name="evalbiasbench",
        overall=groups[0],
        groups=groups[1:],
        macro_accuracy=0.45,
        longer_preferred=0.81,
        length_spearman=0.5,
    )


def make_report(folder: Path, **changes: Any) -> ReportData:
    """A full report over written files, with every text that a model or user can choose being hostile."""
    draw = np.random.default_rng(0)
    gain_P = draw.normal(0.4, 1.0, 80)
    figures = {
        "ess": 0.7,
        "ess_batch": 0.6,
        "grad_norm": 2.5,
        "learning_rate": 1e-3,
        "tokens_per_second": 900.0,
        "flop_share": 0.625,
    }
    figures |= {"memory_gib": 1.5, "peak_memory_gib": 3.5, "padding_share": 0.15, "reward_tilt": 0.2, "weight_max": 0.9}
    figures |= {
        "logp_chosen": -40.0,
        "logp_rejected": -50.0,
        "logp_best": -45.0,
        "logp_ratio": 0.5,
        "argmax_agreement": 0.8,
    }
    figures |= {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.3}
    constant = {f"train/{name}": value for name, value in figures.items()}
    lines = [{"time": i, "step": i, "total": 40, "train/loss": 3 / (i + 1) + 1, **constant} for i in range(40)]
    for line in lines[::10]:  # held-out rows are not looked at after every step
        line["heldout/loss"] = 2 / (line["step"] + 1) + 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = draw.dirichlet([1, 1], 300) * 2
    table = {"step": list(range(300)), "row_id": [f"{i:032x}" for i in range(300)], "weight": weights.tolist()}
    pq.write_table(pa.table(table), folder / "weights.parquet")
    rows, model = "a" * 64, "b" * 64
    steps = (
        StepRow(step="ingest", fingerprint=rows, cached=True, seconds=2.4, inputs={"source": "c" * 64}),
        StepRow(
            step="train",
            label=HOSTILE,
            fingerprint=model,
            cached=False,
            seconds=185.0,
            device="NVIDIA H100 80GB HBM3",
            usd=0.1537,
            inputs={"rows": rows},
            mlflow_url="http://127.0.0.1:5000/#/runs/1",
            prefix=f"s3://bucket/{HOSTILE}",
        ),
    )
    full: dict[str, Any] = {
        "title": f"demo {HOSTILE}",
        "recipe": "demo",
        "verdict": make_verdict(gain_P),
        "contamination": (make_contamination("mmlu", hits=2), make_contamination("bbh", hits=0)),
        "champion_scores": (score("mmlu", 0.5), score("bbh", 0.5), score("bbh", 0.1, filter="strict", decides=False)),
        "challenger_scores": (score("mmlu", 0.495), score("bbh", 0.495)),
        "rewards": tuple(RewardPair(champion=1.0, challenger=1.0 + float(g)) for g in gain_P),
        "samples": (SampleAnswer(prompt=HOSTILE, champion=HOSTILE, challenger="", champion_reward=-1.25),),
        "metrics": folder / "metrics.jsonl",
        "weights": folder / "weights.parquet",
        "training": {"lambda": 0.4375, "regime": "support", "warning": f"only 45% of the prompts: {HOSTILE}"},
        "answers": tuple(
            TrainingAnswer(step=step, prompt=prompt, answer=f"after {step}" if prompt == "Why?" else HOSTILE)
            for step in range(0, 200, 10)
            for prompt in ("Why?", HOSTILE)
        ),
        "preflight": {
            "seconds": 2.5,
            "checks": [
                {"name": "weights", "outcome": "passed", "line": "40 steps: finite", "seconds": 0.5, "rows": []},
                {"name": "bos", "outcome": "not applicable", "line": HOSTILE, "seconds": 0.0, "rows": []},
            ],
        },
        "data": {"rows": 380, "train": 300, "heldout": 80, "quarantined_by_reason": {"empty response": 7, HOSTILE: 2}},
        "judge": {
            "judge": HOSTILE,
            "value": 0.625,
            "low": 0.55,
            "high": 0.7,
            "items": 80,
            "position_bias": 0.25,
            "order_agreement": 0.7,
            "unparseable_pairs": 3,
            "calls": 166,
            "mean_answer_chars": 1234.0,
            "mean_other_answer_chars": 987.0,
            "longer_wins": 0.6,
            "style_control": "unavailable",
            "flag": f"position: {HOSTILE}",
        },
        "reward_model": {"accuracy": 0.71, "length_baseline_accuracy": 0.58, "pairs": 80},
        "alignment": (make_alignment("hha_helpful"), make_alignment(HOSTILE)),
        "reward_tests": (make_reward_test(),),
        "steps": steps,
        "cost": "0.1537 USD, without 2 s that have no price (2.99 USD an hour and device, given).",
        "links": {"Prefect run": "http://127.0.0.1:4200/runs/1", "S3": "s3://bucket/x", HOSTILE: "javascript:alert(3)"},
        "config": {"name": HOSTILE},
        "provenance": {"git": {"commit": "d" * 40, "dirty": False}, "device": HOSTILE},
    }
    return ReportData(**(full | changes))


class Page(HTMLParser):
    """Tags with their attributes, the text a reader sees, the styles, and the charts' data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: dict[str, list[str]] = {"text": [], "script": [], "style": [], "charts": []}
        self.inside = "text"
        self.feed(page)
        self.text = " ".join(" ".join(self.pieces["text"]).split())
        self.style = "".join(self.pieces["style"])
        self.charts: dict[str, Any] = json.loads("".join(self.pieces["charts"]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self.inside = "charts" if ("id", "charts") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            self.inside = "text"

    def handle_data(self, data: str) -> None:
        self.pieces[self.inside].append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(render_report(make_report(tmp_path_factory.mktemp("report"))))


def test_says_the_verdict_first_and_why(page: Page) -> None:
    verdict = make_verdict(np.random.default_rng(0).normal(0.4, 1.0, 80))
    assert page.text.index(verdict.decision.value) < page.text.index("Benchmarks: champion against challenger")
    for reason in (*verdict.reasons, *verdict.flags):
        assert reason in page.text


def test_shows_scores_intervals_reward_data_cost_and_lineage(page: Page) -> None:
    assert "49.5 ± 2.5" in page.text and "50.0 ± 2.5" in page.text
    assert "−0.5" in page.text  # difference in points
    assert "1 computed in this run, 3 min 5 s of work, 1 found done" in page.text
    assert "training: only 45% of the prompts" in page.text and "lambda 0.4375" in page.text
    assert (
        "bbh: 2 runs of the champion alone that vary batch size differ by up to 0.2 points (1.2% of items flip"
        in page.text
    )
    assert "0.1537 USD, without 2 s that have no price" in page.text and "NVIDIA H100 80GB HBM3 0.1537" in page.text
    hrefs = [attributes.get("href") for tag, attributes in page.tags if tag == "a"]
    assert "#step-" + "a" * 16 in hrefs and "http://127.0.0.1:5000/#/runs/1" in hrefs
    assert len({line["line"]["color"] for line in page.charts["logp"]["data"]}) == 3
    assert set(page.charts) == {
        *("guards", "rewards", "gains", "loss", "ess", "memory", "weights", "accuracy", "quarantine", "cost"),
        *("grad_norm", "learning_rate", "tokens_per_second", "flop_share", "padding_share"),
        *("logp", "logp_ratio", "reward_tilt", "weight_shares", "implicit_rewards"),
        *("alignment_gains", "alignment_wins", "reward_tests"),
    }


def test_shows_the_win_rate_with_what_is_known_of_the_judge(page: Page, tmp_path: Path) -> None:
    for shown in (
        "62.5",
        "55.0 to 70.0",
        "25.0 of 100",
        "each pair in both orders, 166 calls",
        "the longer of two wins 60.0",
    ):
        assert shown in page.text
    assert "Win rate by a judge" not in Page(render_report(make_report(tmp_path, judge=None))).text


def test_shows_answers_by_step_and_prompt_and_what_the_preflight_found(page: Page) -> None:
    training = page.text[page.text.index("Answers while training") :]
    assert "after 0" in training and "after 190" in training and "after 10 " not in training
    assert training.index("after 0") < training.index("after 190")
    assert "weights passed 0.5 s 40 steps: finite" in training and "bos not applicable" in training


def test_a_prompt_without_an_answer_after_some_step_has_a_gap() -> None:
    answers = (
        TrainingAnswer(step=0, prompt="a", answer="x"),
        TrainingAnswer(step=5, prompt="a", answer=""),
        TrainingAnswer(step=5, prompt="b", answer="z"),
    )
    assert lay_out_answers(answers) == {"prompts": ["a", "b"], "rows": [(0, ["x", None]), (5, ["", "z"])]}


def test_shows_what_else_the_policy_asks(tmp_path: Path) -> None:
    asked = {
        "floors": {"mmlu": 0.2}, "targets": {"heldout_reward": 0.0, "bbh": 0.0}, "audit_share": 0.2, "planned_looks": 4,
    }  # fmt: skip
    verdict = make_verdict(np.random.default_rng(0).normal(0.4, 1.0, 80), **asked)
    page = Page(render_report(make_report(tmp_path, verdict=verdict)))
    for part in (*verdict.targets, *verdict.floors, *verdict.growths):
        assert part.reason in page.text
    assert "the year's 0.05 over 4 planned looks; 0 looks were taken before it this year" in page.text
    assert (
        "Audit split, which decides nothing" in page.text
        and page.text.count("intervals meet") == len(verdict.audit) == 3
    )
    assert f"Seal {verdict.seal} over the verdict" in page.text
    assert f"a true gain of {verdict.targets[0].promotable_gain:g} would be promoted 4 times in 5" in page.text


def test_a_policy_without_the_reward_as_target_says_so(tmp_path: Path) -> None:
    verdict = make_verdict(np.random.default_rng(0).normal(0.4, 1.0, 80), targets={"bbh": 0.0})
    page = Page(render_report(make_report(tmp_path, verdict=verdict)))
    assert "The held-out reward is no target of this policy." in page.text and "gains" not in page.charts
    assert verdict.targets[0].reason in page.text


def test_shows_what_the_reward_model_says_and_what_is_known_of_it(page: Page) -> None:
    assert "hha_helpful 4 2.000 ± 1.080 2.750 ± 0.479 +0.750 (−1.968 to +3.468)" in page.text.replace("\xa0", " ")
    assert "prompts: 3 were too long to be answered" in page.text
    assert "62.5 (" in page.text and "2 : 1 : 1 80 → 120" in page.text
    assert {"alignment_gains", "alignment_wins", "reward_tests"} <= page.charts.keys()
    assert page.charts["alignment_gains"]["data"][0]["x"] == [0.75, 0.75]
    assert "evalbiasbench length bias 17 30.0 (10.0 to 50.0) 10.0" in page.text.replace("\xa0", " ")
    assert "the longer answer has the higher reward in 81.0 of 100 pairs" in page.text


def test_shows_whose_score_is_suspect_and_why(tmp_path: Path) -> None:
    flagged = score("bbh", 0.0).model_copy(update={"flag": "zero: none of 400 answers is right"})
    report = make_report(tmp_path, challenger_scores=(score("mmlu", 0.495), flagged))
    text = Page(render_report(report)).text
    assert "challenger flagged zero: none of 400 answers is right" in text
    assert "champion flagged" not in text


def test_shows_which_benchmark_items_stand_in_the_training_data(page: Page) -> None:
    part = page.text[
        page.text.index("Benchmark items in the training data") : page.text.index("Held-out reward: before")
    ]
    assert "mmlu in the training data 2 of 400 0.5 % 13 7 50.0 ± 2.5 49.8 ± 2.5 50.0 ± 2.5 49.8 ± 2.5" in part
    assert "bbh 0 of 400 0.0 %" in part and "bbh in the training data" not in part
    assert "mmlu_task, document 1" in part and "dddddddddddd" in part


def test_each_curve_of_training_is_its_own_metric_over_the_steps(page: Page) -> None:
    told = {
        "ess": {"within prompts": 0.7, "of the batch": 0.6},
        "logp": {"chosen": -40.0, "rejected": -50.0, "best": -45.0},
        "logp_ratio": {"log-ratio": 0.5},
        "reward_tilt": {"reward tilt": 0.2},
        "weight_shares": {"largest weight": 0.9, "argmax w = argmax r": 0.8},
        "implicit_rewards": {"chosen": 0.1, "rejected": -0.1, "margin": 0.3},
        "padding_share": {"padding": 0.15},
        "grad_norm": {"gradient norm": 2.5},
        "learning_rate": {"learning rate": 1e-3},
        "tokens_per_second": {"tokens a second": 900.0},
        "flop_share": {"share": 0.625},
        "memory": {"at most": 3.5, "after the step": 1.5},
    }
    assert told.keys() | {"loss"} == CURVES.keys()
    values = [value for series in told.values() for value in series.values()]
    assert len(set(values)) == len(values)  # so that no two curves can be taken for each other
    for chart, series in told.items():
        drawn = {trace["name"]: (trace["x"], trace["y"]) for trace in page.charts[chart]["data"]}
        assert drawn == {name: (list(range(40)), [value] * 40) for name, value in series.items()}, chart
    trained, heldout = page.charts["loss"]["data"]
    assert (trained["name"], trained["x"], trained["y"][:2]) == ("trained", list(range(40)), [4.0, 2.5])
    assert (heldout["name"], heldout["x"]) == ("held out", [0, 10, 20, 30])
    assert heldout["y"] == [3.0, 2 / 11 + 1, 2 / 21 + 1, 2 / 31 + 1]


def test_every_chart_is_a_figure_that_plotly_knows(page: Page) -> None:
    for name, figure in page.charts.items():
        assert go.Figure(figure).data, name  # validates every property


def test_every_chart_has_a_place_and_every_place_a_chart(page: Page) -> None:
    places = [attributes["data-chart"] for _, attributes in page.tags if "data-chart" in attributes]
    assert sorted(places) == sorted(page.charts)


def test_hostile_text_stays_text(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3  # library, data, drawing
    assert not {"img", "iframe", "object"} & set(tags)
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    hrefs = [attributes.get("href") or "" for _, attributes in page.tags]
    assert not [href for href in hrefs if href.startswith("javascript")]
    assert " ".join(HOSTILE.split()) in page.text


def test_chart_labels_carry_no_markup(page: Page) -> None:
    labels = page.charts["quarantine"]["data"][0]["y"] + page.charts["cost"]["data"][0]["y"]
    assert any("&lt;img" in text for text in labels)
    assert not [text for text in labels if "<" in text]


def test_fetches_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert "src" not in attributes and "srcset" not in attributes
        assert tag != "link" or attributes["href"] == "data:,"
    assert page.style and "url(" not in page.style and "@import" not in page.style


def test_equal_data_give_the_equal_page(tmp_path: Path) -> None:
    assert render_report(make_report(tmp_path)) == render_report(make_report(tmp_path))


def test_absent_parts_are_named_and_not_drawn(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"answers": (), "preflight": None, "contamination": ()}
    bare |= {
        "metrics": None,
        "weights": None,
        "training": None,
        "data": None,
        "reward_model": None,
        "config": {},
        "provenance": {},
    }
    bare |= {name: () for name in ("champion_scores", "challenger_scores", "rewards", "samples", "steps")}
    bare |= {"alignment": (), "reward_tests": ()}
    page = Page(render_report(make_report(tmp_path, **bare, links={})))
    for sentence in (
        "This run has no benchmark scores.",
        "The rewards of single prompts were not given to this page.",
        "No benchmark was looked for in the training data.",
        "No sample answers were kept.",
        "This run trained nothing.",
        "There are no weights of responses",
        "No answers were written while training.",
        "This run has no findings of a preflight.",
        "The reward model was given, not trained in this run",
        "The data of this run were not summarised.",
        "The steps of this run were not given to this page.",
        "This recipe asks for no prompt sets.",
        "This recipe tests the reward model on no pair sets.",
        "The environment was not recorded.",
    ):
        assert sentence in page.text
    assert set(page.charts) == {"guards"}


def test_plain_fine_tuning_has_a_loss_and_no_weights(tmp_path: Path) -> None:
    data = make_report(tmp_path, weights=None)
    (tmp_path / "metrics.jsonl").write_text('{"time": 1, "step": 1, "total": 1, "train/loss": 2.0}\n')
    page = Page(render_report(data))
    assert "This objective has no weights, so no effective sample size." in page.text
    assert "loss" in page.charts and "ess" not in page.charts and "weights" not in page.charts
    assert "The share of the device's rate was not measured" in page.text and "flop_share" not in page.charts


def test_durations_read_as_people_say_them() -> None:
    assert [show_seconds(s) for s in (0.04, 59.9, 61, 3_660)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]


@pytest.mark.parametrize(
    ("accuracy", "low", "high", "said"),
    [
        (0.543, 0.443, 0.640, "right in 54.3% of held-out pairs [44.3%, 64.0%], which guessing explains"),
        (0.590, 0.550, 0.630, "no better than that the longer response wins (59.9%)"),
        (0.700, 0.660, 0.740, None),
    ],
)
def test_a_reward_model_that_guesses_is_named_before_the_gain(
    accuracy: float, low: float, high: float, said: str | None
) -> None:
    figures = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "length_baseline_accuracy": 0.599}
    doubts = doubt_reward(figures)
    assert [said in doubt for doubt in doubts] == ([True] if said else [])
    assert doubt_reward({}) == []
