"""Preference data from outside -> rows of one schema, the unusable ones quarantined."""

from tasks.step import Attempt, Metrics, step
from training.config import IngestConfig


@step(version=6)
def ingest(config: IngestConfig, attempt: Attempt) -> Metrics:
    """Read, check, split and store preference rows. Input: `source`."""
    summary = attempt.run_child("training", "ingest")
    return {f"data/{name}": float(summary[name]) for name in ("rows", "train", "heldout", "quarantined")}
