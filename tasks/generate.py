"""Responses of a policy to held-out prompts."""

import json

from tasks.step import Attempt, Metrics, step
from training.config import GenerateConfig


@step(version=5)
def generate(config: GenerateConfig, attempt: Attempt) -> Metrics:
    """Sample responses for the prompts of a split. Inputs: `rows`, `policy`."""
    summary = attempt.run_child("training", "generate")
    attempt.check_weights(
        "policy", json.loads((attempt.output / "manifest.json").read_text())["policy"]["weights_sha256"]
    )
    return {
        "generate/truncated_share": float(summary["truncated_share"]),
        "generate/mean_tokens": float(summary["mean_response_tokens"]),
    }
