"""Real HH-RLHF pairs through ingest, reference and training: what is dropped, and what the weights are made of."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from training import reference, train
from training.data import ingest
from training.job import Job

pytestmark = pytest.mark.slow


def read_summary(job: Job) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((job.output / "summary.json").read_text())
    return summary


def test_real_pairs_train(
    real_data: Path, tiny_policy: Path, make_job: Callable[..., Job], write_rewards: Callable[..., Path], tmp_path: Path
) -> None:
    source = real_data / "hh-rlhf" / "helpful-base"
    rows = make_job("ingest", "rows", config={"responses": "support", "limit": 120}, inputs={"source": source})
    ingest.run(rows)
    scored = make_job(
        "score_reference", "scored", config={"max_tokens": 1024}, inputs={"rows": rows.output, "reference": tiny_policy}
    )
    reference.run(scored)
    dropped = [json.loads(line) for line in (scored.output / "dropped.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in dropped} <= {"too_long", "prompt_not_prefix"}
    all_rows = pq.read_table(rows.output / "rows.parquet").to_pylist()
    assert read_summary(scored)["rows"] + len(dropped) == len(all_rows)
    rewards = write_rewards(
        tmp_path / "rewards", {r["row_id"]: [len(a) / 100 for a in r["responses"]] for r in all_rows}, all_rows
    )
    config = {"objective": "var", "reference_factor": "mean", "batch_prompts": 16, "max_tokens": 1024}
    inputs = {"rows": rows.output, "base": tiny_policy, "rewards": rewards, "reference": scored.output}
    job = make_job("train", "train", config=config, inputs=inputs)
    train.run(job)
    summary = read_summary(job)
    num_train = sum(row["split"] == "train" for row in all_rows)
    assert summary["rows"] + summary["dropped"] == num_train
    assert summary["skipped_steps"] == 0
    weights = pq.read_table(job.output / "weights.parquet").to_pylist()
    assert all(sum(row["weight"]) == pytest.approx(len(row["weight"]), abs=1e-9) for row in weights)
    first = json.loads((job.output / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["train/logp_ratio"]) < 1e-2  # base = reference, before the first update
