"""Rows, score columns and jobs on disk, as the other steps of a run leave them."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from training.data.rows import RowsWriter
from training.data.schema import SCHEMA, digest_row
from training.job import Job

REWARDS = pa.schema([("row_id", pa.string()), ("content_id", pa.string()), ("reward", pa.list_(pa.float64()))])


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Return a function from prompt text and responses to a row of the schema."""

    def make(
        prompt: str,
        responses: Sequence[str],
        *,
        split: str = "train",
        preferred: int | None = 0,
        truncated: list[bool] | None = None,
        logq: list[float] | None = None,
    ) -> dict[str, Any]:
        turns = [{"role": "user", "content": prompt}]
        return {
            "row_id": digest_row(turns, list(responses)),
            "split": split,
            "prompt": turns,
            "responses": list(responses),
            "preferred": preferred,
            "truncated": truncated,
            "logq": logq,
            "source": "test",
            "line": 1,
        }

    return make


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """Return a function that writes a rows folder."""

    def write(folder: Path, rows: Sequence[dict[str, Any]], *, regime: str = "support", **manifest: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with RowsWriter(folder / "rows.parquet", SCHEMA) as out:
            out.write(rows)
        sampling = {} if regime == "support" else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        (folder / "manifest.json").write_text(json.dumps({"regime": regime} | sampling | manifest))
        return folder

    return write


@pytest.fixture
def write_rewards() -> Callable[..., Path]:
    """Return a function that writes a reward column by row id; of `sampled` rows, whose ids say nothing of the responses, these are given."""

    def write(folder: Path, rewards: dict[str, list[float]], sampled: Sequence[dict[str, Any]] = ()) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        content = {row["row_id"]: digest_row(row["prompt"], row["responses"]) for row in sampled}
        with RowsWriter(folder / "scores.parquet", REWARDS) as out:
            out.write(
                [
                    {"row_id": row_id, "content_id": content.get(row_id, row_id), "reward": reward}
                    for row_id, reward in rewards.items()
                ]
            )
        return folder

    return write


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Return a function that makes a job with its own folders below tmp_path; equal names share them, as attempts do."""

    def make(name: str, folder: str, *, config: dict[str, Any], inputs: dict[str, Path], **runtime: Any) -> Job:
        output, work = tmp_path / folder / "output", tmp_path / folder / "work"
        output.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        runtime = {"device": "cpu", "threads": 1, **runtime}
        return Job(name=name, config=config, runtime=runtime, inputs=inputs, output=output, work=work)

    return make


@pytest.fixture
def other_tokenizer(tmp_path: Path, tiny_policy: Path) -> Path:
    """Return a folder with the tiny policy's weights and template, whose tokenizer knows one merge less."""
    folder = tmp_path / "other-tokenizer"
    shutil.copytree(tiny_policy, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def longrope_policy(tmp_path: Path, tiny_policy: Path) -> Path:
    """Return a folder of the tiny policy with LongRoPE: beside a row of more than 64 tokens all have other frequencies."""
    folder = tmp_path / "longrope"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 8.0],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    return folder


@pytest.fixture
def train_inputs(
    tmp_path: Path, tiny_policy: Path, make_row: Callable[..., dict[str, Any]], write_rows: Callable[..., Path]
) -> dict[str, str]:
    """Return the inputs of a training on twelve rows of unequal lengths."""
    rows = [make_row(f"Question {i}?", [f"Answer {'very ' * (i % 5)}{i}", f"No {i}"]) for i in range(12)]
    return {"rows": str(write_rows(tmp_path / "rows", rows)), "base": str(tiny_policy)}


@pytest.fixture
def cores() -> Iterator[Any]:
    """Set the number of threads; as it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
