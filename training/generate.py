"""The job generate: responses sampled from a policy for the prompts of one split.

The prompts go through in windows. A finished window is a file in `work/parts`, so a killed job goes on with the next one.
Rows keep their id, so that what two policies answered to the same prompt can be laid side by side. A response is kept as text, which
is what people and reward models read, and as the tokens that were drawn, which are what training weighs.
"""

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from training.config import GenerateConfig, ResponseRegime, Runtime
from training.data.batch import pack_by_tokens
from training.data.rows import RowsWriter, count_rows, iterate_rows, join_parts, read_rows
from training.data.schema import SCHEMA
from training.data.scored import describe_dropped, finish_windows, join_dropped, open_parts, require_some, write_dropped
from training.job import Job, write_json
from training.memory import run_in_halves
from training.model import ModelDigests, check_context, digest_model, load_policy, start_torch
from training.render import UnusableRow, render_prompt
from training.sampling import draw_noise, find_stop_ids, generate_batch

WINDOW_PROMPTS = 64
BATCH_ROWS = 128  # samples drawn together, where one prompt has no more


@dataclass(frozen=True)
class Prompt:
    """A row and the ids of its prompt."""

    row: dict[str, Any]
    ids: list[int]


@dataclass(frozen=True)
class Generator:
    """What answering one window needs."""

    job: Job
    model: Any
    tokenizer: Any
    stop_ids: list[int]
    config: GenerateConfig
    budget: int
    source: str

    def answer(self, items: Sequence[tuple[Prompt, int]]) -> list[list[int]]:
        """Return the new tokens of each (prompt, number of its sample), drawn in one batch."""
        noise_BS = np.stack([draw_noise(prompt.row["row_id"], sample, config=self.config) for prompt, sample in items])
        prompts = [prompt.ids for prompt, _ in items]
        return generate_batch(
            self.model,
            prompts,
            noise_BS=noise_BS,
            stop_ids=self.stop_ids,
            config=self.config,
            check_stop=self.job.check_stop,
        )


def run(job: Job) -> None:
    """Answer the prompts of a split: `responses.parquet`, `dropped.jsonl`, `manifest.json`, `summary.json` in `output`."""
    config = GenerateConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    device = start_torch(runtime)
    started = time.monotonic()
    policy = job.inputs["policy"]
    model, tokenizer = load_policy(policy, precision=config.precision, device=device)
    longest = config.max_prompt_tokens + config.max_new_tokens
    check_context(model, longest, setting="max_prompt_tokens + max_new_tokens")
    generator = Generator(
        job=job,
        model=model,
        tokenizer=tokenizer,
        stop_ids=find_stop_ids(model, tokenizer),
        config=config,
        budget=runtime.microbatch_tokens,
        source=policy.name,
    )
    row_ids = choose_rows(job.inputs["rows"], config=config)
    digests = digest_model(policy, tokenizer)
    parts = finish_windows(
        job,
        (([row["row_id"] for row in rows], rows) for rows in read_windows(job, config=config, row_ids=row_ids)),
        open_parts(job, policy=asdict(digests)),
        total=len(row_ids),
        rate="generate/tokens_per_second",
        work=partial(answer_window, generator),
    )
    join_parts(parts, job.output / "responses.parquet", schema=SCHEMA)
    dropped = join_dropped(parts, job.output)
    remedy = (
        f"raise max_prompt_tokens, which is {config.max_prompt_tokens}, or bring prompts that the chat template takes"
    )
    require_some(
        count_rows(job.output),
        dropped,
        job.inputs["rows"],
        remedy=remedy,
        of=f"prompts of the {config.split} split",
    )
    write_manifest(job, config, digests)
    summary = summarise(parts) | dropped
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def write_manifest(job: Job, config: GenerateConfig, policy: ModelDigests) -> None:
    """Write manifest.json: samples of which policy, and how they were drawn. Training compares both with its reference."""
    write_json(
        job.output / "manifest.json",
        {
            "regime": ResponseRegime.from_reference,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_new_tokens": config.max_new_tokens,
            "policy": asdict(policy),
        },
    )


def choose_rows(folder: Path, *, config: GenerateConfig) -> set[str]:
    """Return the ids of the rows to answer: all of the split, or the first `limit` of it in the order of their ids."""
    batches = read_rows(folder, split=config.split, columns=["row_id"])
    ids = (row_id for batch in batches for row_id in batch.column("row_id").to_pylist())
    chosen = set(ids) if config.limit is None else set(heapq.nsmallest(config.limit, ids))
    if not chosen:
        raise ValueError(f"rows folder {folder}: got no rows in the {config.split} split, expected at least one")
    return chosen


def read_windows(job: Job, *, config: GenerateConfig, row_ids: set[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield the chosen rows in file order, WINDOW_PROMPTS at a time."""
    rows = iterate_rows(job.inputs["rows"], split=config.split, columns=["row_id", "prompt", "line"])
    chosen = (row for row in rows if row["row_id"] in row_ids)
    while window := list(islice(chosen, WINDOW_PROMPTS)):
        yield window


def render_window(generator: Generator, rows: list[dict[str, Any]]) -> tuple[list[Prompt], list[dict[str, str]]]:
    """Return the prompts that can be answered, and the row id, reason and detail of the others."""
    fitting, unusable = [], []
    for row in rows:
        try:
            ids = render_prompt(generator.tokenizer, row["prompt"])
            if len(ids) > generator.config.max_prompt_tokens:
                raise UnusableRow("too_long", f"{len(ids)} tokens")
            fitting.append(Prompt(row, ids))
        except UnusableRow as error:
            unusable.append(describe_dropped(row["row_id"], error))
    return fitting, unusable


def answer_window(generator: Generator, rows: list[dict[str, Any]], part: Path) -> int:
    """Answer the prompts of some rows K times each, write their part, return the number of new tokens."""
    config, K = generator.config, generator.config.samples_per_prompt
    prompts, unusable = render_window(generator, rows)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * K)]
    # The budget bounds the pass over the prompts, each read once. A later pass has one token a sample, and costs nearly the same for few as
    # for many, but what it keeps is theirs: so a prompt counts for no less than its share of the rows.
    lengths = [max(len(prompt.ids), generator.budget * K // BATCH_ROWS) for prompt in prompts]
    for members in pack_by_tokens(lengths, budget=generator.budget):
        places = [n * K + sample for n in members for sample in range(K)]
        new = run_in_halves(generator.answer, [(prompts[place // K], place % K) for place in places])
        for place, tokens in zip(places, new, strict=True):
            answers[place] = tokens
    texts = generator.tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    write_dropped(part, unusable)
    with RowsWriter(part, SCHEMA) as out:
        out.write(
            [
                {
                    "row_id": prompt.row["row_id"],
                    "split": config.split,
                    "prompt": prompt.row["prompt"],
                    "responses": texts[n * K : (n + 1) * K],
                    "preferred": None,
                    "logq": None,
                    "truncated": [tokens[-1] not in generator.stop_ids for tokens in answers[n * K : (n + 1) * K]],
                    "response_ids": answers[n * K : (n + 1) * K],
                    "source": generator.source,
                    "line": prompt.row["line"],
                }
                for n, prompt in enumerate(prompts)
            ]
        )
    return sum(map(len, answers))


def summarise(parts: list[Path]) -> dict[str, float | int]:
    """Return the figures of all responses, read part by part."""
    prompts = responses = truncated = empty = chars = tokens = 0
    for part in parts:
        for row in pq.read_table(part, columns=["responses", "truncated", "response_ids"]).to_pylist():
            prompts += 1
            responses += len(row["responses"])
            truncated += sum(row["truncated"])
            empty += sum(not response.strip() for response in row["responses"])
            chars += sum(map(len, row["responses"]))
            tokens += sum(map(len, row["response_ids"]))
    return {
        "prompts": prompts,
        "responses": responses,
        "truncated_share": truncated / responses,
        "empty_responses": empty,
        "mean_response_chars": chars / responses,
        "mean_response_tokens": tokens / responses,
    }
