"""Benchmarks: the mirror they are read from, and one step for each model and benchmark."""

import json

from evaluation.config import BenchmarkConfig
from evaluation.harness.mirror import build_mirror
from tasks.step import Attempt, Metrics, step
from training.config import Config


class MirrorConfig(Config):
    """Nothing to choose: a mirror follows from its files."""


@step(version=1)
def mirror(config: MirrorConfig, attempt: Attempt) -> Metrics:
    """Lay benchmark files out as the stock tasks of lm-eval read them, offline. Input: `raw`."""
    rows = build_mirror(attempt.inputs["raw"], attempt.output)
    return {"mirror/files": float(len(rows)), "mirror/rows": float(sum(rows.values()))}


@step(version=4)
def evaluate(config: BenchmarkConfig, attempt: Attempt) -> Metrics:
    """Run one benchmark on one model. Inputs: `model`, or the config and tokenizer of a served one, and `mirror`."""
    attempt.run_child("evaluation", "benchmark")
    rows = json.loads((attempt.output / "scores.json").read_text())
    metrics: Metrics = {}
    for row in rows:
        if row["decides"]:
            name = f"eval/{row['benchmark']}/{row['metric'].replace('@', '_at_')}"  # MLflow takes no @ in names
            metrics |= {name: row["value"], f"eval/{row['benchmark']}/n": row["n"]}
            if row["stderr"] is not None:  # a single item has none
                metrics[f"{name}_stderr"] = row["stderr"]
    return metrics


@step(version=1)
def evaluate_varied(config: BenchmarkConfig, attempt: Attempt) -> Metrics:
    """Run one benchmark on one model under another few-shot seed or batch size, for the noise floor: no score to compare models by.

    Inputs: `model`, `mirror`.
    """
    attempt.run_child("evaluation", "benchmark")
    return {}
