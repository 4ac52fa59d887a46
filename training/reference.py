"""The job score_reference: log-probability of every response under the reference, once, as a stored column.

The rows go through in windows. A finished window is a file in `work/parts`, so a killed job goes on with the next one, and
memory does not grow with the number of rows.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from training.config import ReferenceScoreConfig, Runtime
from training.data.batch import cut, lay_out
from training.data.manifest import check_tokens, read_rows_manifest
from training.data.rows import RowsWriter, count_rows, join_parts, read_rows
from training.data.schema import digest_row
from training.data.scored import (
    CONTENT_ID,
    describe_dropped,
    finish_windows,
    join_dropped,
    open_parts,
    require_finite,
    require_some,
    write_dropped,
)
from training.job import Job, write_json
from training.logprobs import check_head, check_layout, choose_groups, longest_of, sum_logps
from training.memory import run_in_halves
from training.model import check_context, digest_model, load_policy, start_torch
from training.render import Rendered, Renderer, UnusableRow

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        CONTENT_ID,
        pa.field(
            "logp", pa.list_(pa.float64()), nullable=False
        ),  # nats, summed over trained tokens, stop token included
        pa.field("num_tokens", pa.list_(pa.int32()), nullable=False),  # trained tokens
    ]
)
WINDOW_ROWS = 64
COLUMNS = ["row_id", "prompt", "responses", "truncated", "response_ids"]


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
    check_tokens(job.inputs["rows"], read_rows_manifest(job.inputs["rows"]), tokenizer)
    renderer = Renderer(tokenizer, max_tokens=config.max_tokens)
    scorer = Scorer(model=model, renderer=renderer, runtime=runtime, device=device, job=job)
    prepare_layout(scorer, find_extremes(scorer))
    digests = asdict(digest_model(job.inputs["reference"], tokenizer))
    parts = finish_windows(
        job,
        ((window.column("row_id").to_pylist(), window) for window in read_windows(job)),
        open_parts(job, reference=digests),
        total=count_rows(job.inputs["rows"]),
        rate="score/tokens_per_second",
        work=lambda window, part: score_window(scorer, window.to_pylist(), part),
    )
    join_parts(parts, job.output / "scores.parquet", schema=SCHEMA)
    dropped = join_dropped(parts, job.output)
    summary = summarise(job) | dropped
    require_some(summary["rows"], dropped, job.inputs["rows"], remedy="raise max_tokens or mend the rows")
    write_json(job.output / "manifest.json", {"model": digests, "max_tokens": config.max_tokens})
    summary |= {
        "model_type": model.config.model_type,
        "precision": config.precision.value,
        "max_tokens": config.max_tokens,
    }
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def read_windows(job: Job) -> Iterator[pa.RecordBatch]:
    """Yield what is scored of the rows, a window at a time."""
    return read_rows(job.inputs["rows"], columns=COLUMNS, batch_rows=WINDOW_ROWS)


def prepare_layout(scorer: Scorer, groups: Iterable[Sequence[Rendered]]) -> None:
    """Make the model ready for the layout, after a look at the longest of all groups that are to be scored."""
    if chosen := choose_groups(groups):
        check_layout(scorer.model, chosen, layout=scorer.runtime.layout, device=scorer.device)


def find_extremes(scorer: Scorer) -> list[Sequence[Rendered]]:
    """Return a short row and the two longest of the whole file, rendered.

    Not all are rendered for it, which takes its time: a token is a byte at least, so a row with fewer bytes than the longest so far
    has tokens is no longer than they are, but for the template's own.
    """
    chosen: list[Sequence[Rendered]] = []
    for window in read_windows(scorer.job):
        scorer.job.check_stop()
        least = longest_of(chosen[1]) if len(chosen) == 3 else 0
        rows = [row for row in window.to_pylist() if bound_tokens(row) >= least]
        rendered, _ = render_rows(scorer.renderer, rows)
        chosen = choose_groups([*chosen, *rendered.values()])
    return chosen


def bound_tokens(row: dict[str, Any]) -> int:
    """Return how many tokens a prompt with its longest response has at most, without those of the template."""
    prompt = sum(len(message["content"].encode()) for message in row["prompt"])
    responses = row["response_ids"] or [response.encode() for response in row["responses"]]
    return prompt + max(map(len, responses))


def score_window(scorer: Scorer, rows: list[dict[str, Any]], part: Path) -> int:
    """Render and score some rows, write their part, return the tokens that went through the model. ValueError names rows without a finite
    log-probability."""
    rendered, dropped = render_rows(scorer.renderer, rows)
    logps, tokens = score_groups(scorer, list(rendered.values()))
    name = scorer.model.name_or_path
    require_finite(
        dict(zip(rendered, logps, strict=True)), of=f"reference {name}: got NaN or infinite log-probabilities"
    )
    content = {row["row_id"]: digest_row(row["prompt"], row["responses"]) for row in rows}
    scores = [
        {
            "row_id": row_id,
            "content_id": content[row_id],
            "logp": logp_K,
            "num_tokens": [sample.num_trained for sample in samples],
        }
        for (row_id, samples), logp_K in zip(rendered.items(), logps, strict=True)
    ]
    write_dropped(part, dropped)
    with RowsWriter(part, SCHEMA) as out:
        out.write(scores)
    return tokens


def render_rows(
    renderer: Renderer, rows: list[dict[str, Any]]
) -> tuple[dict[str, list[Rendered]], list[dict[str, str]]]:
    """Return the responses of each row by its id, and the rows that cannot be rendered with their reasons."""
    rendered: dict[str, list[Rendered]] = {}
    dropped: list[dict[str, str]] = []
    for row in rows:
        try:
            rendered[row["row_id"]] = renderer.stored(row)
        except UnusableRow as unusable:
            dropped.append(describe_dropped(row["row_id"], unusable))
    return rendered, dropped


def score_groups(scorer: Scorer, groups: list[list[Rendered]]) -> tuple[list[list[float]], int]:
    """Return the log-probabilities of each group's responses, in nats, and the tokens that went through the model."""
    samples = [sample for group in groups for sample in group]
    counts = [len(group) for group in groups]
    group_R = np.repeat(np.arange(len(groups)), counts)
    logp_R = np.zeros(len(samples))
    tokens = 0
    layout = scorer.runtime.layout

    def score(members: Sequence[int]) -> list[float]:
        nonlocal tokens
        chosen = [samples[index] for index in members]
        micro = lay_out(chosen, group_R[list(members)], device=scorer.device, layout=layout)
        with torch.inference_mode():
            logps: list[float] = sum_logps(scorer.model, micro).tolist()
        tokens += micro.num_tokens
        return logps

    for members in cut(samples, group_R, budget=scorer.runtime.microbatch_tokens, whole_groups=False, layout=layout):
        scorer.job.check_stop()
        logp_R[members] = run_in_halves(score, members)
    ends = np.cumsum(counts)
    return [logp_R[end - n : end].tolist() for n, end in zip(counts, ends, strict=True)], tokens


def summarise(job: Job) -> dict[str, Any]:
    """Return the counts of all scores, read a part at a time."""
    rows = responses = trained = 0
    logp = 0.0
    with pq.ParquetFile(job.output / "scores.parquet") as file:
        for batch in file.iter_batches(columns=["logp", "num_tokens"]):
            rows += batch.num_rows
            responses += len(batch.column("logp").flatten())
            trained += batch.column("num_tokens").flatten().sum().as_py() or 0
            logp += batch.column("logp").flatten().sum().as_py() or 0.0
    summary: dict[str, Any] = {"rows": rows, "responses": responses, "trained_tokens": trained}
    return summary | ({"logp_per_token": logp / trained} if trained else {})
