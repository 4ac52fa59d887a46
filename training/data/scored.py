"""What a scorer leaves of each window of rows: a part with the scores of those that it could read, and the others with the reason."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.rows import find_rows_file
from training.job import Job, read_json_lines, write_json
from training.model import read_config_file
from training.render import UnusableRow
from training.weights import digest_file

LOG = logging.getLogger(__name__)
DROPPED = "dropped.jsonl"
CONTENT_ID = pa.field("content_id", pa.string(), nullable=False)  # `digest_row` of what was scored
ROWS_SHOWN = 5


def describe_dropped(row_id: str, unusable: UnusableRow) -> dict[str, str]:
    """Return the line of a row that is left out."""
    return {"row_id": row_id, "reason": unusable.reason, "detail": str(unusable)}


def write_dropped(part: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write the rows that a window's part leaves out, atomically; the part itself is written after it, and says that both are done."""
    path = dropped_file(part)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def dropped_file(part: Path) -> Path:
    """Return the file of a part that names its dropped rows."""
    return part.with_suffix(".dropped.jsonl")


def open_parts(job: Job, *, plan: str = "", **models: Mapping[str, str]) -> Path:
    """Return `work/parts`, which holds what an earlier attempt finished: empty where that had another config, other rows, another plan or
    other models, which are given by the names of their inputs with their digests."""
    folder, told = job.work / "parts", job.work / "parts.json"
    read = {name: [digests, *read_settings(job.inputs[name])] for name, digests in models.items()}
    of = {"config": job.config, "rows": digest_file(find_rows_file(job.inputs["rows"])), "plan": plan, **read}
    of = json.loads(json.dumps(of, default=str))
    found = None
    with suppress(FileNotFoundError, ValueError):  # a file that a power cut left empty tells nothing
        found = json.loads(told.read_text())
    if folder.is_dir() and found != of:
        others = ", ".join(name for name in of if found and found.get(name) != of[name])
        made = f"was made of another {others}" if found else "is of nobody knows what"
        LOG.warning("%s: what is finished there %s; begun anew", folder, made)
        shutil.rmtree(folder)
    write_json(told, of)  # before the folder, which tells of nothing then
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_settings(folder: Path) -> list[Any]:
    """Return what a model folder says beside its weights and tokenizer: of its layers, and of where its answers end."""
    files = (folder / "config.json", folder / "generation_config.json")
    return [read_config_file(file) for file in files if file.is_file()]


def is_finished(part: Path, row_ids: Sequence[str]) -> bool:
    """Return whether a part is there and of these very rows; one without a file of dropped rows leaves out none."""
    if not part.is_file():
        return False
    dropped = [line["row_id"] for line in read_json_lines(dropped_file(part))] if dropped_file(part).is_file() else []
    found = pq.read_table(part, columns=["row_id"]).column("row_id").to_pylist()
    return sorted(found + dropped) == sorted(row_ids)


def join_dropped(parts: Iterable[Path], output: Path) -> dict[str, int]:
    """Write `dropped.jsonl` of all parts and return its counts: `dropped`, and by reason `dropped_<reason>`."""
    reasons: Counter[str] = Counter()
    partial = output / (DROPPED + ".partial")
    with partial.open("w") as out:
        for part in parts:
            for line in read_json_lines(dropped_file(part)):
                reasons[line["reason"]] += 1
                out.write(json.dumps(line) + "\n")
    partial.replace(output / DROPPED)
    return {"dropped": reasons.total()} | {f"dropped_{reason}": count for reason, count in sorted(reasons.items())}


def read_dropped(folder: Path) -> set[str]:
    """Return the row ids that a scorer left out on purpose."""
    return {line["row_id"] for line in read_json_lines(folder / DROPPED)} if (folder / DROPPED).is_file() else set()


def require_some(rows: int, dropped: Mapping[str, int], folder: Path, *, remedy: str) -> None:
    """Raise ValueError where no row of a folder is left to be scored."""
    if rows == 0:
        reasons = ", ".join(f"{n} {name.removeprefix('dropped_')}" for name, n in dropped.items() if name != "dropped")
        raise ValueError(
            f"rows folder {folder}: all {dropped['dropped']} rows were dropped ({reasons or 'there were none'}); {remedy}"
        )


def require_finite(values: Mapping[str, Sequence[float] | np.ndarray], *, of: str) -> None:
    """Raise ValueError that names the rows whose scores are NaN or infinite; `of` says whose scores they are."""
    bad = [row_id for row_id, scores in values.items() if not np.isfinite(scores).all()]
    if bad:
        raise ValueError(
            f"{of} for {len(bad)} of {len(values)} rows ({', '.join(bad[:ROWS_SHOWN])}), expected finite ones; try precision "
            "float32, or another model"
        )
