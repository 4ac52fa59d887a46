"""Work on rows window by window, which a killed job goes on with: of each is left a part with what came of those that could be read, and the
others with the reason."""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.rows import find_rows_file
from training.job import METRICS_FILE, Job, read_json_lines, write_json, write_whole
from training.metrics import MetricsWriter
from training.model import read_config_file
from training.render import UnusableRow
from training.weights import digest_file

LOG = logging.getLogger(__name__)
DROPPED = "dropped.jsonl"
CONTENT_ID = pa.field("content_id", pa.string(), nullable=False)  # `digest_row` of what was scored
ROWS_SHOWN = 5
W = TypeVar("W")  # a window of rows


def describe_dropped(row_id: str, unusable: UnusableRow) -> dict[str, str]:
    """Return the line of a row that is left out."""
    return {"row_id": row_id, "reason": unusable.reason, "detail": str(unusable)}


def write_dropped(part: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write the rows that a window's part leaves out, atomically; the part itself is written after it, and says that both are done."""
    with write_whole(dropped_file(part)) as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def read_left_out(part: Path) -> list[dict[str, Any]]:
    """Return the lines of the rows that a part leaves out: none without a file of them."""
    return read_json_lines(dropped_file(part)) if dropped_file(part).is_file() else []


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
    """Return whether a part is there and of these very rows."""
    if not part.is_file():
        return False
    dropped = [line["row_id"] for line in read_left_out(part)]
    found = pq.read_table(part, columns=["row_id"]).column("row_id").to_pylist()
    return sorted(found + dropped) == sorted(row_ids)


def finish_windows(
    job: Job,
    windows: Iterable[tuple[Sequence[str], W]],
    folder: Path,
    *,
    total: int,
    rate: str,
    work: Callable[[W, Path], int],
) -> list[Path]:
    """Do every window of rows, given with their ids, that has no finished part in a folder yet; return the parts in the order of the windows.

    `work` writes a window's part and returns how much it did of what the metric `rate` counts a second; `total` is the number of all rows.
    """
    parts: list[Path] = []
    done = 0
    with MetricsWriter(job.output / METRICS_FILE, total=total) as metrics:
        for row_ids, window in windows:
            parts.append(part := folder / f"part-{len(parts):06d}.parquet")
            done += len(row_ids)
            if is_finished(part, row_ids):
                continue
            job.check_stop()
            started = time.monotonic()
            count = work(window, part)
            metrics.write(done, {rate: count / (time.monotonic() - started)})
    return parts


def join_dropped(parts: Iterable[Path], output: Path) -> dict[str, int]:
    """Write `dropped.jsonl` of all parts and return its counts."""
    reasons: Counter[str] = Counter()
    with write_whole(output / DROPPED) as out:
        for part in parts:
            for line in read_left_out(part):
                reasons[line["reason"]] += 1
                out.write(json.dumps(line) + "\n")
    return count_dropped(reasons)


def count_dropped(reasons: Counter[str]) -> dict[str, int]:
    """Return what a summary says of rows that are left out: `dropped`, and by reason `dropped_<reason>`."""
    return {"dropped": reasons.total()} | {f"dropped_{reason}": count for reason, count in sorted(reasons.items())}


def read_dropped(folder: Path) -> set[str]:
    """Return the row ids that a scorer left out on purpose."""
    return {line["row_id"] for line in read_json_lines(folder / DROPPED)} if (folder / DROPPED).is_file() else set()


def require_some(rows: int, dropped: Mapping[str, int], folder: Path, *, remedy: str, of: str = "rows") -> None:
    """Raise ValueError where none of a folder's rows is left."""
    if rows == 0:
        reasons = ", ".join(f"{n} {name.removeprefix('dropped_')}" for name, n in dropped.items() if name != "dropped")
        raise ValueError(
            f"rows folder {folder}: all {dropped['dropped']} {of} were dropped ({reasons or 'there were none'}); {remedy}"
        )


def require_finite(values: Mapping[str, Sequence[float] | np.ndarray], *, of: str) -> None:
    """Raise ValueError that names the rows whose scores are NaN or infinite; `of` says whose scores they are."""
    bad = [row_id for row_id, scores in values.items() if not np.isfinite(scores).all()]
    if bad:
        raise ValueError(
            f"{of} for {len(bad)} of {len(values)} rows ({', '.join(bad[:ROWS_SHOWN])}), expected finite ones; try precision "
            "float32, or another model"
        )
