"""Held-out answers as the step `generate` leaves them, by row id. Rows of one prompt are not independent: whatever has an interval
over prompts takes `read_prompt_ids` for its clusters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from training.data.rows import find_rows_file
from training.data.schema import digest_prompt


def read_prompt_ids(folder: Path) -> dict[str, str]:
    """Return the digest of each row's prompt. A row's own id is also of its responses, so rows of one prompt have several."""
    return {row["row_id"]: digest_prompt(row["prompt"]) for row in _read(folder, "prompt")}


def read_lengths(folder: Path) -> dict[str, float]:
    """Return the mean length of each row's answers in characters."""
    return {
        row["row_id"]: sum(map(len, row["responses"])) / len(row["responses"]) for row in _read(folder, "responses")
    }


def read_cut_share(folder: Path) -> float:
    """Return which share of the answers the token cap cut; 0 for answers that nobody sampled."""
    cut = [ended for row in _read(folder, "truncated") for ended in row["truncated"] or ()]
    return sum(cut) / max(len(cut), 1)


def _read(folder: Path, column: str) -> Iterator[dict[str, Any]]:
    yield from pq.read_table(find_rows_file(folder), columns=["row_id", column]).to_pylist()
