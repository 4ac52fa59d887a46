"""Judging: a judge's verdicts on pairs of answers."""

import json
import re
from typing import Any, cast

from evaluation.judges.config import JudgeConfig, LocalJudge
from infra import records
from infra.records import Record
from tasks.execute import StepAttempt
from tasks.step import Attempt, Metrics, step

CALLS_FILE = "calls.jsonl"  # of evaluation.judges.judging, which needs SciPy
TOLD = (
    "position_bias", "order_agreement", "repeat_agreement", "tie_share", "longer_wins", "mean_answer_chars", "unparseable_pairs", "calls",
    "tokens",
)  # fmt: skip
NOISE = ("flip_rate", "max_difference")  # of a judge that draws, over its repeats
EARLIER = 8  # evaluations whose calls are looked through


@step(version=4)
def judge(config: JudgeConfig, attempt: Attempt) -> Metrics:
    """Have a judge say which of two answers is better. Inputs: `benchmark`, its files, and what evaluation.judges.judging lists."""
    take_over(config, cast(StepAttempt, attempt))  # the only one that needs the store
    summary = attempt.run_child("evaluation", "judge")
    if isinstance(config.judge, LocalJudge):
        read = json.loads((attempt.output / "profile.json").read_text())["judge"]["weights_sha256"]
        attempt.check_weights("judge", read)
    return describe(summary, config=config)


def describe(summary: dict[str, Any], *, config: JudgeConfig) -> Metrics:
    """Return the figures by the names that they have in MLflow; of a group `eval/evalbiasbench/length_bias/accuracy`."""
    start = f"eval/{config.name}"
    score = f"{start}/{summary['metric']}"
    figures = {score: summary["value"], f"{score}_stderr": summary["stderr"], f"{start}/n": summary["items"]}
    figures |= {f"{score}_low": summary["low"], f"{score}_high": summary["high"]}
    figures |= {f"{start}/judge_{name}": summary.get(name) for name in TOLD}
    figures |= {f"noise/{config.name}/judge_{name}": summary.get(name) for name in NOISE}
    for name, value in summary.items():
        group = name.removeprefix("accuracy_")
        if group != name:
            figures[f"{start}/{re.sub('[^a-z]+', '_', group.lower())}/accuracy"] = value
    return {name: float(value) for name, value in figures.items() if value is not None}


def take_over(config: JudgeConfig, attempt: StepAttempt) -> None:
    """Begin with what this judge answered in earlier evaluations of this benchmark: under another limit, say, only the rest is asked.

    Its file names the judge, so that another's answers are never taken, and at the end keeps only what was asked for.
    """
    calls, store = attempt.output / CALLS_FILE, attempt.execution.store
    if calls.exists():
        return
    alike = [record for record in records.iterate(store, "judge") if is_alike(record, config, attempt)]
    header, kept = "", dict[str, str]()
    for record in sorted(alike, key=lambda record: record.created)[-EARLIER:]:
        found = store.get(f"{record.prefix}/{CALLS_FILE}")
        first, *lines = found[0].decode().splitlines() if found else [""]
        if first != header:
            header, kept = first, {}
        kept |= {json.loads(line)[0]: line for line in lines}
    if kept:
        calls.write_text("".join(f"{line}\n" for line in (header, *kept.values())))


def is_alike(record: Record, config: JudgeConfig, attempt: StepAttempt) -> bool:
    """Tell whether an earlier evaluation may have asked what this one asks."""
    was = record.identity["config"]
    same = all(
        was[name] == config.model_dump(mode="json")[name] for name in ("benchmark", "judge", "max_answer_tokens")
    )
    return same and record.inputs.get("judge") == attempt.fingerprints.get("judge")
