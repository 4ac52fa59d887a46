"""A Bradley-Terry reward model from the train split."""

from tasks.step import Attempt, Metrics, step
from training.config import RewardModelConfig


@step(version=4)
def reward_model(config: RewardModelConfig, attempt: Attempt) -> Metrics:
    """Train a reward model and measure it on held-out pairs. Inputs: `rows`, `base`."""
    summary = attempt.run_child("training", "reward_model")
    names = ("accuracy", "length_baseline_accuracy")
    return {f"reward_model/{name}": float(summary[name]) for name in names if summary.get(name) is not None}
