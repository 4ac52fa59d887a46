"""The job score_rewards: the reward of every response under a reward model, once, as a stored column.

The rows go through in windows. A finished window is a file in `work/parts`, so a killed job loses at most the window it was
in, and memory does not grow with the number of rows.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.config import RewardScoreConfig, Runtime
from training.data.rows import RowsWriter, count_rows, join_parts, read_rows
from training.data.schema import digest_row
from training.data.scored import (
    CONTENT_ID,
    finish_windows,
    join_dropped,
    open_parts,
    require_finite,
    require_some,
    write_dropped,
)
from training.job import Job
from training.model import start_torch
from training.render import UnusableRow
from training.reward.scorer import RewardScorer, load_scorer
from training.reward.statistics import RewardStatistics

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        CONTENT_ID,
        pa.field("reward", pa.list_(pa.float64()), nullable=False),  # in the order of the row's responses
    ]
)
PART_SCHEMA = SCHEMA.append(pa.field("cut", pa.int32(), nullable=False))  # responses of the row that did not fit whole
WINDOW_ROWS = 256


def run(job: Job) -> None:
    """Score every row of both splits: `scores.parquet`, `dropped.jsonl`, `summary.json` in `output`."""
    config = RewardScoreConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    device = start_torch(runtime)
    started = time.monotonic()
    scorer = load_scorer(
        job.inputs["scorer"],
        render=config.render,
        max_tokens=config.max_tokens,
        precision=config.precision,
        device=device,
    )
    scorer.check()
    parts = finish_windows(
        job,
        ((window.column("row_id").to_pylist(), window) for window in read_windows(job)),
        open_parts(job, scorer=scorer.digests(job.inputs["scorer"])),
        total=count_rows(job.inputs["rows"]),
        rate="score/responses_per_second",
        work=lambda window, part: score_window(scorer, window.to_pylist(), part, budget=runtime.microbatch_tokens),
    )
    if not parts:
        raise ValueError(f"rows folder {job.inputs['rows']}: got no rows, expected at least one; ingest a source first")
    join_parts(parts, job.output / "scores.parquet", schema=SCHEMA)
    dropped = join_dropped(parts, job.output)
    rows = pq.ParquetFile(job.output / "scores.parquet").metadata.num_rows
    require_some(rows, dropped, job.inputs["rows"], remedy="mend the rows, or take another reward model")
    summary = summarise(job, parts) | dropped
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def read_windows(job: Job) -> Iterator[pa.RecordBatch]:
    """Yield the rows, a window at a time."""
    return read_rows(job.inputs["rows"], batch_rows=WINDOW_ROWS)


def score_window(scorer: RewardScorer, rows: list[dict[str, Any]], part: Path, *, budget: int) -> int:
    """Score some rows, write their part, return the number of responses. ValueError names rows without a finite reward."""
    dropped: list[dict[str, str]] = []
    try:
        by_row = score_rows(scorer, rows, budget=budget)
    except UnusableRow:
        rows, dropped = scorer.split(rows)
        by_row = score_rows(scorer, rows, budget=budget) if rows else []
    require_finite(
        {row["row_id"]: reward for row, reward, _ in by_row},
        of=f"reward model {scorer.model.name_or_path}: got NaN or infinite rewards",
    )
    write_dropped(part, dropped)
    with RowsWriter(part, PART_SCHEMA) as out:
        out.write(
            [
                {
                    "row_id": row["row_id"],
                    "content_id": digest_row(row["prompt"], row["responses"]),
                    "reward": reward.tolist(),
                    "cut": int(cut.sum()),
                }
                for row, reward, cut in by_row
            ]
        )
    return sum(len(row["responses"]) for row in rows)


def score_rows(
    scorer: RewardScorer, rows: list[dict[str, Any]], *, budget: int
) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Return each row with its responses' rewards, and which of them did not fit; UnusableRow where the model refuses one of the rows."""
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    responses = [response for row in rows for response in row["responses"]]
    rewards, cut = scorer.score(prompts, responses, budget=budget)
    ends = np.cumsum([len(row["responses"]) for row in rows])[:-1]
    return list(zip(rows, np.split(rewards, ends), np.split(cut, ends), strict=True))


def summarise(job: Job, parts: list[Path]) -> dict[str, float | int]:
    """Return the figures of the whole column, read window by window."""
    statistics, cut = RewardStatistics(), 0
    for window, part in zip(read_windows(job), parts, strict=True):
        scored = {score["row_id"]: score for score in pq.read_table(part).to_pylist()}
        for row in (row for row in window.to_pylist() if row["row_id"] in scored):
            score = scored[row["row_id"]]
            chars = [len(response) for response in row["responses"]]
            statistics.add(score["reward"], chars=chars, preferred=row["preferred"], split=row["split"])
            cut += score["cut"]
    return statistics.summarise() | {"cut_responses": cut}
