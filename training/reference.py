"""The job score_reference: log-probability of every response under the reference, once, as a stored column.

The rows go through in windows. A finished window is a file in `work/parts`, so a killed job goes on with the next one, and
memory does not grow with the number of rows.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from training.config import ReferenceScoreConfig, Runtime
from training.data.batch import collate, pack_by_tokens
from training.data.rows import RowsWriter, find_rows_file, join_parts, read_rows
from training.job import Job, write_json
from training.logprobs import check_head, sum_logps
from training.metrics import MetricsWriter
from training.model import check_context, digest_model, load_policy, start_torch
from training.render import Rendered, Renderer, UnusableRow

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field(
            "logp", pa.list_(pa.float64()), nullable=False
        ),  # nats, summed over trained tokens, stop token included
        pa.field("num_tokens", pa.list_(pa.int32()), nullable=False),  # trained tokens
    ]
)
WINDOW_ROWS = 64


@dataclass(frozen=True)
class Scorer:
    """What scoring one window needs."""

    model: Any
    renderer: Renderer
    runtime: Runtime
    device: torch.device
    job: Job


def run(job: Job) -> None:
    """Score every row of both splits: `scores.parquet`, `dropped.jsonl`, `manifest.json`, `summary.json` in `output`."""
    config = ReferenceScoreConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    device = start_torch(runtime)
    started = time.monotonic()
    model, tokenizer = load_policy(job.inputs["reference"], precision=config.precision, device=device)
    check_head(model)
    check_context(model, config.max_tokens)
    renderer = Renderer(tokenizer, max_tokens=config.max_tokens)
    scorer = Scorer(model=model, renderer=renderer, runtime=runtime, device=device, job=job)
    parts = score_windows(scorer)
    summary = assemble(parts, job)
    if summary["rows"] == 0:
        raise ValueError(
            f"rows folder {job.inputs['rows']}: {describe_drops(summary)}; raise max_tokens or mend the rows"
        )
    digests = asdict(digest_model(job.inputs["reference"], tokenizer))
    write_json(job.output / "manifest.json", {"model": digests, "max_tokens": config.max_tokens})
    summary |= {
        "model_type": model.config.model_type,
        "precision": config.precision.value,
        "max_tokens": config.max_tokens,
    }
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def score_windows(scorer: Scorer) -> list[Path]:
    """Score every window that has no finished part yet; return the parts in the order of the rows."""
    job = scorer.job
    folder = job.work / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    total = pq.ParquetFile(find_rows_file(job.inputs["rows"])).metadata.num_rows
    parts: list[Path] = []
    done = 0
    with MetricsWriter(job.output / "metrics.jsonl", total=total) as metrics:
        columns = ["row_id", "prompt", "responses", "truncated"]
        for window in read_rows(job.inputs["rows"], columns=columns, batch_rows=WINDOW_ROWS):
            part = folder / f"part-{len(parts):06d}.parquet"
            parts.append(part)
            done += window.num_rows
            if is_finished(part, window.column("row_id").to_pylist()):
                continue
            job.check_stop()
            started = time.monotonic()
            tokens = score_window(scorer, window.to_pylist(), part)
            metrics.write(done, {"score/tokens_per_second": tokens / (time.monotonic() - started)})
    return parts


def dropped_file(part: Path) -> Path:
    """Return the file of a part that names its dropped rows."""
    return part.with_suffix(".dropped.jsonl")


def is_finished(part: Path, row_ids: list[str]) -> bool:
    """Return whether a part is there and of these very rows. Its parquet file is written last."""
    if not part.is_file():
        return False
    dropped = [json.loads(line)["row_id"] for line in dropped_file(part).read_text().splitlines()]
    found = pq.read_table(part, columns=["row_id"]).column("row_id").to_pylist()
    return sorted(found + dropped) == sorted(row_ids)


def score_window(scorer: Scorer, rows: list[dict[str, Any]], part: Path) -> int:
    """Render and score some rows, write their part, return the tokens that went through the model."""
    samples: list[Rendered] = []
    owners: list[tuple[str, int]] = []  # row and its number of responses
    dropped: list[dict[str, str]] = []
    for row in rows:
        try:
            rendered = scorer.renderer.row(row["prompt"], row["responses"], row["truncated"])
        except UnusableRow as unusable:
            dropped.append({"row_id": row["row_id"], "reason": unusable.reason, "detail": str(unusable)})
            continue
        samples += rendered
        owners.append((row["row_id"], len(rendered)))
    logps = score_samples(scorer, samples)
    scores, begin = [], 0
    for row_id, count in owners:
        span = slice(begin, begin + count)
        num_tokens = [sample.num_trained for sample in samples[span]]
        scores.append({"row_id": row_id, "logp": logps[span], "num_tokens": num_tokens})
        begin += count
    write_lines(dropped_file(part), dropped)
    with RowsWriter(part, SCHEMA) as out:
        out.write(scores)
    return sum(len(sample.ids_T) for sample in samples)


def score_samples(scorer: Scorer, samples: list[Rendered]) -> list[float]:
    """Return the log-probability of each sample, in nats, in their order."""
    logps = [0.0] * len(samples)
    lengths = [len(sample.ids_T) for sample in samples]
    for members in pack_by_tokens(lengths, budget=scorer.runtime.microbatch_tokens):
        scorer.job.check_stop()
        with torch.inference_mode():
            values = sum_logps(scorer.model, collate(samples, members, device=scorer.device)).tolist()
        for member, value in zip(members, values, strict=True):
            logps[member] = value
    return logps


def assemble(parts: list[Path], job: Job) -> dict[str, Any]:
    """Join the parts into the artifact's files and return the counts."""
    join_parts(parts, job.output / "scores.parquet", schema=SCHEMA)
    reasons: Counter[str] = Counter()
    partial = job.output / "dropped.jsonl.partial"
    with partial.open("w") as out:
        for part in parts:
            for line in dropped_file(part).read_text().splitlines(keepends=True):
                reasons[json.loads(line)["reason"]] += 1
                out.write(line)
    partial.replace(job.output / "dropped.jsonl")
    rows = responses = trained = 0
    logp = 0.0
    with pq.ParquetFile(job.output / "scores.parquet") as file:
        for batch in file.iter_batches(columns=["logp", "num_tokens"]):
            rows += batch.num_rows
            responses += len(batch.column("logp").flatten())
            trained += batch.column("num_tokens").flatten().sum().as_py() or 0
            logp += batch.column("logp").flatten().sum().as_py() or 0.0
    summary: dict[str, Any] = {"rows": rows, "responses": responses, "trained_tokens": trained}
    summary |= {"dropped": reasons.total()} | {f"dropped_{reason}": count for reason, count in sorted(reasons.items())}
    return summary | ({"logp_per_token": logp / trained} if trained else {})


def describe_drops(summary: dict[str, Any]) -> str:
    """Return how many rows were dropped and why, in words."""
    reasons = ", ".join(
        f"{count} {name.removeprefix('dropped_')}" for name, count in summary.items() if name.startswith("dropped_")
    )
    return f"all {summary['dropped']} rows were dropped ({reasons or 'there were none'})"


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    """Write JSON lines atomically."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
