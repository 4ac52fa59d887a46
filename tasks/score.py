"""Columns of numbers for stored responses: rewards, and log-probabilities under the reference."""

from tasks.step import Attempt, Metrics, step
from training.config import ReferenceScoreConfig, RewardScoreConfig


@step(version=1)
def score_rewards(config: RewardScoreConfig, attempt: Attempt) -> Metrics:
    """Give every response its reward. Inputs: `rows`, `scorer`."""
    summary = attempt.run_child("training", "score_rewards")
    return {"reward/mean": float(summary["mean"]), "reward/std": float(summary["std"])}


@step(version=2)
def score_reference(config: ReferenceScoreConfig, attempt: Attempt) -> Metrics:
    """Give every response its log-probability under the reference. Inputs: `rows`, `reference`."""
    summary = attempt.run_child("training", "score_reference")
    return {"reference/rows": float(summary["rows"]), "reference/dropped": float(summary["dropped"])}
