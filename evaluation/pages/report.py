"""The report: one HTML page that says what was decided and on what evidence, readable without any server or network.

Whatever a model or a data set wrote is shown as text: Jinja escapes it, and links are links only to http and https. A part
that a run does not have is named as absent, never drawn empty.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from pydantic import Field

from evaluation.alignment import AlignmentResult
from evaluation.config import HELDOUT_REWARD
from evaluation.gate.explain import explain_noise, show_share
from evaluation.gate.verdict import Verdict
from evaluation.harness.contamination import Contamination
from evaluation.harness.result import ScoreRow
from evaluation.pages import report_plots
from evaluation.reward_bias import RewardBias
from training.config import Config
from training.job import read_json_lines

ForestRow = tuple[str, str, float, float, float]  # name, series, value, low, high

# Of training: by chart its axis, and the metric of each name in the legend.
CURVES = {
    "loss": ("loss, nats per token", {"trained": "train/loss", "held out": "heldout/loss"}),
    "ess": ("effective sample size, share", {"within prompts": "train/ess", "of the batch": "train/ess_batch"}),
    "logp": (
        "log-probability, nats",
        {"chosen": "train/logp_chosen", "rejected": "train/logp_rejected", "best": "train/logp_best"},
    ),
    "logp_ratio": ("log-ratio to the reference, nats", {"log-ratio": "train/logp_ratio"}),
    "reward_tilt": ("weighted minus plain mean", {"reward tilt": "train/reward_tilt"}),
    "weight_shares": ("share", {"largest weight": "train/weight_max", "argmax w = argmax r": "train/argmax_agreement"}),
    "implicit_rewards": (
        "implicit reward",
        {"chosen": "train/rewards/chosen", "rejected": "train/rewards/rejected", "margin": "train/rewards/margins"},
    ),
    "padding_share": ("padding, share of the tokens", {"padding": "train/padding_share"}),
    "grad_norm": ("gradient norm before clipping", {"gradient norm": "train/grad_norm"}),
    "learning_rate": ("learning rate", {"learning rate": "train/learning_rate"}),
    "tokens_per_second": ("tokens a second", {"tokens a second": "train/tokens_per_second"}),
    "flop_share": ("share of the device's rate", {"share": "train/flop_share"}),
    "memory": ("memory, GiB", {"at most": "train/peak_memory_gib", "after the step": "train/memory_gib"}),
}
MOST_ANSWERED_STEPS = 8
MOST_WEIGHTS = 1_000_000  # read for the histogram; more add nothing that a reader could see


class RewardPair(Config):
    """Rewards of both models' answers to one held-out prompt."""

    champion: float
    challenger: float


class SampleAnswer(Config):
    """One held-out prompt and what both models answered."""

    prompt: str
    champion: str
    challenger: str
    champion_reward: float | None = None
    challenger_reward: float | None = None


class TrainingAnswer(Config):
    """What the policy answered to a held-out prompt after so many steps of training."""

    step: int
    prompt: str
    answer: str


class StepRow(Config):
    """One step of the run, for cost and lineage."""

    step: str
    label: str = ""
    fingerprint: str
    cached: bool
    seconds: float  # of the computation, whenever it was
    device: str = ""
    usd: float | None = None  # None where no price of the device is known
    inputs: dict[str, str]  # name -> fingerprint of a step, or digest of a source
    mlflow_url: str | None = None
    prefix: str = ""  # where its files lie

    @property
    def title(self) -> str:
        return f"{self.step} · {self.label}" if self.label else self.step


class ReportData(Config):
    """Everything the page shows. What a run has not got is None or empty."""

    title: str
    recipe: str
    verdict: Verdict
    contamination: tuple[Contamination, ...] = ()  # of each benchmark in the rows that the challenger was trained on
    champion_scores: tuple[ScoreRow, ...] = ()
    challenger_scores: tuple[ScoreRow, ...] = ()
    rewards: tuple[RewardPair, ...] = ()
    samples: tuple[SampleAnswer, ...] = ()
    metrics: Path | None = None  # metrics.jsonl of the train step
    weights: Path | None = None  # weights.parquet of the train step
    training: dict[str, Any] | None = None  # its summary; a `warning` is among the doubts
    answers: tuple[TrainingAnswer, ...] = ()  # answers.jsonl of the train step
    preflight: dict[str, Any] | None = None  # preflight.json of the train step
    data: dict[str, Any] | None = None  # counts of ingest; `quarantined_by_reason` is drawn
    reward_model: dict[str, Any] | None = None  # its summary; `accuracy` and `length_baseline_accuracy` are drawn
    judge: dict[str, Any] | None = None  # summary of a judge's step on the held-out answers
    alignment: tuple[AlignmentResult, ...] = ()  # model: the challenger, baseline: the champion
    reward_tests: tuple[RewardBias, ...] = ()
    steps: tuple[StepRow, ...] = ()
    cost: str = ""  # what they cost together, in a sentence
    links: dict[str, str] = Field({})
    config: dict[str, Any] = Field({})
    provenance: dict[str, Any] = Field({})


def render_report(data: ReportData) -> str:
    """Return the page, about 5 MB of which are the drawing library. Equal data give the equal page."""
    return (
        make_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            verdict=data.verdict,
            doubts=[*data.verdict.flags, *doubt_reward(data.reward_model or {}), *doubt_weights(data.training or {})],
            charts=draw_charts(data),
            scores=pair_scores(data),
            answers=lay_out_answers(data.answers),
            counts=dict(flatten(data.data or {}, without="quarantined_by_reason")),
            training_figures=dict(flatten(data.training or {}, without="warning")),
            reward_figures=dict(flatten(data.reward_model or {})),
            provenance=dict(flatten(data.provenance)),
            names={step.fingerprint: step.title for step in data.steps},
            plotly=Markup(get_plotlyjs()),
            plot_config=report_plots.CONFIG,
        )
    )


def make_environment() -> Environment:
    """Return Jinja with what the pages of this folder need: escaping, numbers as people read them, no undefined names."""
    environment = Environment(
        loader=PackageLoader("evaluation.pages", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "points": show_points,
        "number": show_number,
        "share": show_share,
        "reward": show_reward,
        "seconds": show_seconds,
        "pretty": show_json,
        "noise": lambda floor, benchmark: explain_noise(benchmark, floor),
    }
    environment.tests["web"] = is_web
    return environment


def doubt_reward(summary: dict[str, Any]) -> list[str]:
    """Return what a reader should know of the reward model before believing a gain, or its absence, on the reward."""
    if not {"accuracy", "accuracy_low", "accuracy_high", "length_baseline_accuracy"} <= summary.keys():
        return []
    accuracy, length = summary["accuracy"], summary["length_baseline_accuracy"]
    said = f"reward model: right in {accuracy:.1%} of held-out pairs [{summary['accuracy_low']:.1%}, {summary['accuracy_high']:.1%}]"
    if summary["accuracy_low"] <= 0.5:
        return [
            f"{said}, which guessing explains: what it rewards is not shown to be what the data prefers, so the policy was trained "
            "towards noise, and neither a gain on it nor its absence says much; train it on more pairs, or take one that is given"
        ]
    if accuracy <= length:
        return [f"{said}, no better than that the longer response wins ({length:.1%}): it may reward length alone"]
    return []


def doubt_weights(summary: dict[str, Any]) -> list[str]:
    """Return what the objective itself warns of, where it does."""
    return [f"training: {summary['warning']}"] if "warning" in summary else []


def lay_out_answers(answers: tuple[TrainingAnswer, ...]) -> dict[str, Any]:
    """Return `prompts`, and `rows` of (step, an answer to each): the first and last of all steps, and some between."""
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    steps = sorted({answer.step for answer in answers})
    if len(steps) > MOST_ANSWERED_STEPS:
        places = np.linspace(0, len(steps) - 1, MOST_ANSWERED_STEPS).round().astype(int)
        steps = [steps[place] for place in places]
    told = {(answer.step, answer.prompt): answer.answer for answer in answers}
    return {"prompts": prompts, "rows": [(step, [told.get((step, prompt)) for prompt in prompts]) for step in steps]}


def draw_charts(data: ReportData) -> dict[str, report_plots.Figure]:
    """Return the charts for which there is data, by name."""
    charts: dict[str, report_plots.Figure | None] = {}
    if data.verdict.guards:
        charts["guards"] = report_plots.plot_guards(data.verdict.guards)
    if data.rewards:
        champion, challenger = [p.champion for p in data.rewards], [p.challenger for p in data.rewards]
        gains = [after - before for after, before in zip(challenger, champion, strict=True)]
        charts["rewards"] = report_plots.plot_rewards(champion, challenger)
        target = data.verdict.target(HELDOUT_REWARD)
        charts["gains"] = report_plots.plot_gains(gains, target) if target else None
    if data.metrics:
        lines = read_json_lines(data.metrics)
        for name, (title, series) in CURVES.items():
            charts[name] = report_plots.plot_curves(lines, series, title=title)
    if data.weights:
        charts["weights"] = report_plots.plot_weights(read_weights(data.weights))
    model = data.reward_model or {}
    if model.get("accuracy") is not None and model.get("length_baseline_accuracy") is not None:
        charts["accuracy"] = report_plots.plot_accuracy(model["accuracy"], model["length_baseline_accuracy"])
    charts |= draw_alignment(data)
    reasons = (data.data or {}).get("quarantined_by_reason")
    if reasons:
        charts["quarantine"] = report_plots.plot_counts(reasons, x="rows set aside", colour=report_plots.OPEN)
    if data.steps:
        charts["cost"] = report_plots.plot_cost([(step.title, step.seconds, step.cached) for step in data.steps])
    return {name: figure for name, figure in charts.items() if figure}


def draw_alignment(data: ReportData) -> dict[str, report_plots.Figure]:
    """Return the forest plots of the prompt sets' gains and win rates, and of a reward model's accuracy on pair sets."""

    def above_half(name: str, whose: str, value: float, low: float, high: float) -> ForestRow:
        return name, whose, 100 * (value - 0.5), 100 * (low - 0.5), 100 * (high - 0.5)

    gains: list[ForestRow] = [
        (each.name, "challenger", each.gain.difference, each.gain.low, each.gain.high)
        for each in data.alignment
        if each.gain
    ]
    wins = [(each.name, each.win_rate) for each in data.alignment if each.win_rate]
    rates = [above_half(name, "challenger", won.value, won.low, won.high) for name, won in wins]
    right = [
        above_half(f"{each.name}: {row.group}", "reward model", row.accuracy, row.low, row.high)
        for each in data.reward_tests
        for row in (each.overall, *each.groups)
    ]
    drawn = {
        "alignment_gains": (gains, "challenger minus champion, reward"),
        "alignment_wins": (rates, "win rate minus 50, points"),
        "reward_tests": (right, "accuracy minus 50, points"),
    }
    return {name: report_plots.plot_forest(rows, x=x) for name, (rows, x) in drawn.items() if rows}


def pair_scores(data: ReportData) -> list[tuple[ScoreRow | None, ScoreRow | None]]:
    """Return (champion, challenger) score rows of the same benchmark, task, metric and filter; deciding ones first."""

    def by_key(rows: tuple[ScoreRow, ...]) -> dict[tuple[str, ...], ScoreRow]:
        return {(row.benchmark, row.task, row.metric, row.filter): row for row in rows}

    champion, challenger = by_key(data.champion_scores), by_key(data.challenger_scores)
    keys = dict.fromkeys([*challenger, *champion])
    pairs = [(champion.get(key), challenger.get(key)) for key in keys]
    return sorted(pairs, key=lambda pair: not any(row and row.decides for row in pair))


def read_weights(path: Path) -> list[float]:
    """Return the weights of all responses in all steps, of the first million at most."""
    weights: list[float] = []
    for batch in pq.ParquetFile(path).iter_batches(columns=["weight"]):
        weights += [weight for row in batch.column("weight").to_pylist() for weight in row]
        if len(weights) >= MOST_WEIGHTS:
            break
    return weights[:MOST_WEIGHTS]


def flatten(tree: Mapping[str, Any], *, without: str = "", path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each leaf."""
    for name, value in tree.items():
        below = f"{path}{name}"
        if below == without:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, without=without, path=f"{below}.")
        else:
            yield below, value


def show_points(score: float | None, *, sign: bool = False) -> str:
    """Return a score from 0 to 1 in points of 100, one decimal."""
    return "" if score is None else f"{100 * score:{'+' if sign else ''}.1f}".replace("-", "−")


def show_reward(reward: float, *, sign: bool = False) -> str:
    """Return a reward with three decimals."""
    return f"{reward:{'+' if sign else ''}.3f}".replace("-", "−")


def show_number(value: Any, *, sign: bool = False) -> str:
    """Return a number in at most four significant digits, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:{'+' if sign else ''},}".replace("-", "−")
    return f"{value:{'+' if sign else ''}.4g}".replace("-", "−")


def show_seconds(seconds: float) -> str:
    """Return a duration as a person would say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def show_json(value: Any) -> str:
    """Return indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)


def is_web(url: str) -> bool:
    """Tell whether a link may be one: `javascript:` and its like may not."""
    return url.startswith(("http://", "https://"))
