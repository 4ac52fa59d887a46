"""The `ingest` job: source rows -> rows.parquet in the one schema, split by prompt, the unusable ones quarantined.

Two passes, so that memory does not grow with the source: the first parses, checks and spools rows while an index on disk
remembers what was seen; the second drops the rows that others contradict. A kill loses the attempt, and a rerun starts over.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from training.config import IngestConfig, ResponseRegime, SourceFormat
from training.data.conflicts import SeenRows
from training.data.rows import RowsWriter
from training.data.schema import SCHEMA, digest_row
from training.data.sources import SourceRow, list_files, read_source
from training.data.splits import choose_split
from training.data.validate import Reason, UnusableRow, detect_format, parse_row
from training.job import METRICS_FILE, Job, write_json, write_whole
from training.metrics import MetricsWriter

CHUNK_ROWS = 256
PLACES_SHOWN = 3


@dataclass
class Counts:
    """What became of the source rows."""

    read: int = 0
    removed_responses: int = 0
    repeated_samples: int = 0
    responses: int = 0
    response_chars: int = 0
    prompt_chars: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few "source:line"

    def keep(self, row: dict[str, Any]) -> None:
        """Count a row of rows.parquet."""
        self.splits[row["split"]] += 1
        self.responses += len(row["responses"])
        self.response_chars += sum(map(len, row["responses"]))
        self.prompt_chars += sum(len(message["content"]) for message in row["prompt"])


@dataclass(frozen=True)
class Quarantine:
    """quarantine.jsonl: one line a row that is not in rows.parquet, with the reason."""

    out: TextIO
    counts: Counts

    def put(self, *, source: str, line: int, reason: Reason, detail: str, raw: str) -> None:
        """Write a row down and count it."""
        entry = {"source": source, "line": line, "reason": reason, "detail": detail, "raw": raw}
        self.out.write(json.dumps(entry) + "\n")
        self.counts.reasons[reason] += 1
        places = self.counts.first.setdefault(reason, [])
        if len(places) < PLACES_SHOWN:
            places.append(f"{source}:{line}")


def run(job: Job) -> None:
    """Ingest `inputs["source"]`, a file or a folder of files, by an IngestConfig."""
    config = IngestConfig.model_validate(job.config)
    source, counts, candidates = job.inputs["source"], Counts(), job.work / "candidates.parquet"
    files, ignored = list_files(source)
    with (
        SeenRows(job.work / "seen.sqlite") as seen,
        write_whole(job.output / "quarantine.jsonl") as refused,
        RowsWriter(job.output / "rows.parquet", SCHEMA) as out,
    ):
        quarantine = Quarantine(refused, counts)
        _collect(job, config, seen=seen, quarantine=quarantine, counts=counts, candidates=candidates)
        if config.responses is ResponseRegime.support:
            seen.find_refused()
        _keep(job, seen=seen, quarantine=quarantine, counts=counts, candidates=candidates, out=out)
        prompts = seen.count_prompts()
        _check_counts(counts, config=config, source=source, prompts=prompts)
    candidates.unlink()
    names = [path.name if source.is_file() else path.relative_to(source).as_posix() for path in files]
    _write_manifest(job, config, counts=counts, prompts=prompts, files=names, ignored=ignored)


def _collect(
    job: Job, config: IngestConfig, *, seen: SeenRows, quarantine: Quarantine, counts: Counts, candidates: Path
) -> None:
    """First pass: everything that can be said of a row by itself, and of a row and those before it."""
    place, waiting = 0, []
    files, _ = list_files(job.inputs["source"])
    total = sum(path.stat().st_size for path in files)
    with RowsWriter(candidates, SCHEMA) as spool, MetricsWriter(job.output / METRICS_FILE, total=total) as metrics:
        for row, format in _with_format(read_source(job.inputs["source"]), config.format):
            if config.limit is not None and counts.read == config.limit:
                break
            counts.read += 1
            try:
                waiting.append(_understand(row, format, config=config, seen=seen, place=place, counts=counts))
                place += 1
            except UnusableRow as unusable:
                quarantine.put(
                    source=row.source, line=row.line, reason=unusable.reason, detail=unusable.detail, raw=row.raw()
                )
            if counts.read % CHUNK_ROWS == 0:
                spool.write(waiting)
                waiting = []
                job.check_stop()
                metrics.write(row.bytes_done, {"rows": counts.read, "quarantined": counts.reasons.total()})
        spool.write(waiting)
        metrics.write(total, {"rows": counts.read, "quarantined": counts.reasons.total()})


def _with_format(rows: Iterator[SourceRow], format: SourceFormat) -> Iterator[tuple[SourceRow, SourceFormat | None]]:
    """Yield each row with its format; under `auto` the first row of a file that looks like one decides for the file."""
    source, detected = None, None
    for row in rows:
        if row.source != source:
            source, detected = row.source, None
        detected = detected or detect_format(row.value)
        yield row, detected if format is SourceFormat.auto else format


def _understand(
    row: SourceRow, format: SourceFormat | None, *, config: IngestConfig, seen: SeenRows, place: int, counts: Counts
) -> dict[str, Any]:
    """Return the row in the schema and remember it, or raise UnusableRow.

    A fixed set holds a row once. Among samples equal rows are draws of their own, and leaving one out would bias the estimator:
    each is kept, with a number in its id, since scores are kept by row id.
    """
    if row.problem is not None:
        raise UnusableRow(Reason.not_json, row.problem)
    if format is None:
        keys = sorted(row.value) if isinstance(row.value, dict) else type(row.value).__name__
        raise UnusableRow(Reason.unknown_shape, f"got {keys}, expected 'chosen' and 'rejected', or 'responses'")
    parsed = parse_row(row.value, format=format, config=config)
    row_id = content_id = digest_row(parsed.prompt, parsed.responses)
    if config.responses is ResponseRegime.support:
        earlier = seen.find_duplicate(content_id, preferred=parsed.preferred)
        if earlier is not None:
            raise UnusableRow(Reason.duplicate, f"same prompt and responses as {earlier}")
    elif repeats := seen.count(content_id):
        row_id = digest_row(parsed.prompt, parsed.responses, repeats=repeats)
        counts.repeated_samples += 1
    seen.add(place, parsed, content_id=content_id, at=f"{row.source}:{row.line}")
    if format is SourceFormat.responses:
        counts.removed_responses += len(row.value["responses"]) - len(parsed.responses)
    return {
        "row_id": row_id,
        "split": choose_split(parsed.prompt, heldout_fraction=config.heldout_fraction),
        "prompt": parsed.prompt,
        "responses": parsed.responses,
        "preferred": parsed.preferred,
        "truncated": parsed.truncated,
        "logq": parsed.logq,
        "response_ids": None,  # of text from outside nobody knows the tokens
        "source": row.source,
        "line": row.line,
    }


def _keep(
    job: Job, *, seen: SeenRows, quarantine: Quarantine, counts: Counts, candidates: Path, out: RowsWriter
) -> None:
    """Second pass: write the rows that no other row contradicts or stands for."""
    place = 0
    with pq.ParquetFile(candidates, pre_buffer=False) as spooled:
        for batch in spooled.iter_batches(batch_size=CHUNK_ROWS, use_threads=False):
            job.check_stop()
            rows = batch.to_pylist()
            refused = seen.read_refused(start=place, stop=place + len(rows))
            for n, row in enumerate(rows):
                if place + n in refused:
                    _quarantine_refused(row, *refused[place + n], quarantine=quarantine)
                else:
                    counts.keep(row)
            out.write([row for n, row in enumerate(rows) if place + n not in refused])
            place += len(rows)


def _quarantine_refused(row: dict[str, Any], reason: str, other: str, *, quarantine: Quarantine) -> None:
    details = {
        Reason.contradiction: f"{other} prefers the other way round",
        Reason.duplicate: f"same prompt and responses as {other}, which says which one is preferred",
    }
    quarantine.put(
        source=row["source"],
        line=row["line"],
        reason=Reason(reason),
        detail=details[Reason(reason)],
        raw=json.dumps({name: row[name] for name in ("prompt", "responses", "preferred")}),
    )


def _check_counts(counts: Counts, *, config: IngestConfig, source: Path, prompts: int) -> None:
    """Refuse a source that is empty, too broken, or too small to be split."""
    if counts.read == 0:
        raise ValueError(f"source {source}: got no rows, expected at least one preference; check the path and the file")
    unusable = counts.reasons.total()
    share = unusable / counts.read
    if share > config.max_invalid_fraction:
        reasons = ", ".join(
            f"{reason} {count} (first: {', '.join(counts.first[reason])})"
            for reason, count in counts.reasons.most_common()
        )
        raise ValueError(
            f"source {source}: {unusable} of {counts.read} rows are unusable, a share of {share:.4g}, at most "
            f"{config.max_invalid_fraction:g} expected: {reasons}; mend the source or raise max_invalid_fraction to "
            f"{math.ceil(share * 1000) / 1000:g}"
        )
    for split in ("train", "heldout"):
        if counts.splits[split] == 0:
            raise ValueError(
                f"source {source}: none of {prompts} prompts fell into the {split} split at heldout_fraction "
                f"{config.heldout_fraction:g}, expected at least one; bring more prompts or change heldout_fraction"
            )


def _write_manifest(
    job: Job, config: IngestConfig, *, counts: Counts, prompts: int, files: list[str], ignored: list[str]
) -> None:
    """Write manifest.json, what a later step must know of these rows, and the summary."""
    rows = counts.splits.total()
    reasons = dict(sorted(counts.reasons.items()))
    figures = {
        "read": counts.read,
        "rows": rows,
        "train": counts.splits["train"],
        "heldout": counts.splits["heldout"],
        "prompts": prompts,
        "responses": counts.responses,
        "removed_equal_responses": counts.removed_responses,
        "repeated_samples": counts.repeated_samples,
        "quarantined": counts.reasons.total(),
        "quarantined_by_reason": reasons,
    }
    write_json(
        job.output / "manifest.json",
        {"schema_version": config.schema_version, "regime": config.responses, **figures}
        | {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        | {"files": files, "ignored_files": ignored},
    )
    means = {
        "mean_prompt_chars": counts.prompt_chars / rows,
        "mean_response_chars": counts.response_chars / counts.responses,
    }
    job.write_summary(figures | means)
