"""Columns of numbers for stored responses: rewards, and log-probabilities under the reference; and what two models say of single tokens."""

from tasks.step import Attempt, Metrics, step
from training.config import CrossScoreConfig, ReferenceScoreConfig, RewardScoreConfig, TokenScoreConfig


@step(version=3)
def score_rewards(config: RewardScoreConfig, attempt: Attempt) -> Metrics:
    """Give every response its reward. Inputs: `rows`, `scorer`."""
    summary = attempt.run_child("training", "score_rewards")
    return {f"reward/{name}": float(summary[name]) for name in ("mean", "std", "dropped")}


@step(version=7)
def score_reference(config: ReferenceScoreConfig, attempt: Attempt) -> Metrics:
    """Give every response its log-probability under the reference. Inputs: `rows`, `reference`."""
    summary = attempt.run_child("training", "score_reference")
    return {"reference/rows": float(summary["rows"]), "reference/dropped": float(summary["dropped"])}


@step(version=8)
def score_cross(config: CrossScoreConfig, attempt: Attempt) -> Metrics:
    """Give every response of a training batch its reward and log-probability under every prompt of that batch.

    Inputs: `rows`, `base`, `scorer`, and the rows' own `reference` scores and `rewards`, whose dropped rows are no part of a batch.
    """
    summary = attempt.run_child("training", "score_cross")
    return {"cross/pairs": float(summary["pairs"])}


@step(version=5)
def score_tokens(config: TokenScoreConfig, attempt: Attempt) -> Metrics:
    """Give every token of a few answers its log-probability under two models. Inputs: `reference`, `policy` (models),
    `reference_answers`, `policy_answers`."""
    summary = attempt.run_child("training", "score_tokens")
    return {"tokens/answers": float(summary["answers"]), "tokens/scored": float(summary["scored_tokens"])}
