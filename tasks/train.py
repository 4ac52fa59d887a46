"""The policy, trained."""

import logging

from tasks.step import Attempt, Metrics, step
from training.objectives.objective import TrainConfig

logger = logging.getLogger("varflow.train")


@step(version=7)
def train(config: TrainConfig, attempt: Attempt) -> Metrics:
    """Train the policy on scored responses. Inputs: `rows`, `base`, and the columns that the objective needs."""
    summary = attempt.run_child("training", "train")
    if "warning" in summary:
        logger.warning("train: %s", summary["warning"])
    names = (
        *("final_loss", "tokens_per_second", "mean_ess", "ess_collapsed", "argmax_agreement"),
        *("lambda", "variance_reference_factor", "variance_reward_over_lambda"),
    )
    return {f"train/{name}": float(summary[name]) for name in names if summary.get(name) is not None}
