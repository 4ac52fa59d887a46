"""The job score_cross: rewards and reference log-probabilities of every response of a batch under every prompt of it.

The batches are those that training will take, so the matrices hold for one batch plan and are kept with its digest. A finished
batch is a file in `work/parts`, so a killed job goes on with the next one.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.config import CrossScoreConfig, Runtime
from training.data.batch import digest_plan, plan_steps
from training.data.examples import Example, load_examples
from training.data.manifest import read_rows_manifest
from training.data.rows import RowsWriter, iterate_rows, join_parts
from training.data.scored import finish_windows, open_parts, read_dropped, require_finite
from training.data.selection import select_distinct
from training.job import Job, write_json
from training.logprobs import check_head
from training.model import check_context, digest_model, load_policy, start_torch
from training.objectives.objective import Cross, TrainConfig
from training.objectives.var import Normaliser, ReferenceFactor, check_regime
from training.reference import Scorer, prepare_layout, score_groups
from training.render import Rendered, Renderer, UnusableRow
from training.reward.scorer import RewardScorer, load_scorer

# G prompts and N responses of a global batch

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field(
            "reward", pa.list_(pa.float64()), nullable=False
        ),  # of each response of the batch under this row's prompt
        pa.field("logp", pa.list_(pa.float64()), nullable=False),  # nats, summed over trained tokens
    ]
)
MAX_PAIRS = 1_000_000


@dataclass(frozen=True)
class Pairs:
    """The (prompt, response) pairs of one step: responses of all rows, and each prompt rendered with every one of them."""

    step: int
    rows: list[dict[str, Any]]
    responses: list[str]
    samples_GN: list[list[Rendered]]


def run(job: Job) -> None:
    """Score every batch: `scores.parquet`, `manifest.json` and `summary.json` in `output`. ValueError above MAX_PAIRS pairs."""
    config = CrossScoreConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    device = start_torch(runtime)
    started = time.monotonic()
    check_regime(read_rows_manifest(job.inputs["rows"]).regime, ReferenceFactor.sum, Normaliser.cross_batch)
    model, tokenizer = load_policy(job.inputs["base"], precision=config.precision, device=device)
    check_head(model)
    check_context(model, config.max_tokens)
    renderer = Renderer(tokenizer, max_tokens=config.max_tokens)
    unscored = {
        row_id for name in ("reference", "rewards") if name in job.inputs for row_id in read_dropped(job.inputs[name])
    }
    examples, _ = load_examples(
        job.inputs["rows"],
        renderer,
        select=select_distinct,
        min_responses=2,
        unscored=frozenset(unscored),
        distinct=True,  # as the objective that takes it, which is for fixed sets alone
    )
    batches = plan_batches(examples, config)
    summary = check_cost(batches, max_pairs=MAX_PAIRS)
    scorer = Scorer(model=model, renderer=renderer, runtime=runtime, device=device, job=job)
    rows = read_batch_rows(job.inputs["rows"], batches)
    prepare_layout(scorer, render_longest(renderer, batches, rows))
    rewards = load_scorer(
        job.inputs["scorer"],
        render=config.reward.render,
        max_tokens=config.reward.max_tokens,
        precision=config.reward.precision,
        device=device,
    )
    rewards.check()
    digests = asdict(digest_model(job.inputs["base"], tokenizer))
    plan = digest_batches(batches)
    parts = finish_windows(
        job,
        (([example.row_id for example in batch], (step, batch)) for step, batch in enumerate(batches)),
        open_parts(job, plan=plan, base=digests, scorer=rewards.digests(job.inputs["scorer"])),
        total=sum(map(len, batches)),
        rate="score/pairs_per_second",
        work=lambda window, part: score_batch(scorer, rewards, *window, rows, part),
    )
    join_parts(parts, job.output / "scores.parquet", schema=SCHEMA)
    write_json(job.output / "manifest.json", {"plan": plan, "model": digests})
    job.write_summary(summary | {"wall_seconds": round(time.monotonic() - started, 3)})


def plan_batches(examples: Sequence[Example], config: CrossScoreConfig | TrainConfig) -> list[list[Example]]:
    """Return the rows of every step of the run."""
    steps = plan_steps(len(examples), batch_prompts=config.batch_prompts, epochs=config.epochs, seed=config.seed)
    return [[examples[index] for index in step] for step in steps]


def digest_batches(batches: Sequence[Sequence[Example]]) -> str:
    """Return 64 hex digits over the rows of every step and the token ids of their responses."""
    order = json.dumps([[example.row_id for example in batch] for batch in batches])
    examples = {example.row_id: example for batch in batches for example in batch}
    ids = (sample.ids_T.tobytes() for _, example in sorted(examples.items()) for sample in example.samples)
    return digest_plan([order, *ids])


def check_cost(batches: Sequence[Sequence[Example]], *, max_pairs: int) -> dict[str, Any]:
    """Say what is about to be scored, and return it; ValueError where it is more than `max_pairs`."""
    responses = [sum(len(example.samples) for example in batch) for batch in batches]
    pairs = sum(len(batch) * count for batch, count in zip(batches, responses, strict=True))
    once = sum(
        len(example.samples) for example in {example.row_id: example for batch in batches for example in batch}.values()
    )
    cost = (
        f"{pairs} pairs of prompt and response in {len(batches)} batches, {pairs / once:.1f} times the {once} responses"
    )
    if pairs > max_pairs:
        raise ValueError(
            f"score_cross: {cost}; expected at most {max_pairs}; lower batch_prompts or epochs, or normalise in_batch"
        )
    sys.stderr.write(f"score_cross: {cost}, each through reference and reward model\n")
    return {"steps": len(batches), "pairs": pairs, "responses": once}


def read_batch_rows(folder: Path, batches: Sequence[Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """Return what is scored of the rows of all batches by row id."""
    wanted = {example.row_id for batch in batches for example in batch}
    return {
        row["row_id"]: row
        for row in iterate_rows(folder, split="train", columns=["row_id", "prompt", "responses", "truncated"])
        if row["row_id"] in wanted
    }


def render_longest(
    renderer: Renderer, batches: Sequence[Sequence[Example]], rows: dict[str, dict[str, Any]]
) -> list[list[Rendered]]:
    """Return every prompt of the batch with the longest pair, each with the shortest and the longest response of that batch."""

    def longest_pair(step: int) -> int:
        samples = [sample for example in batches[step] for sample in example.samples]
        return max(sample.start for sample in samples) + max(sample.num_trained for sample in samples)

    step = max(range(len(batches)), key=longest_pair)
    pairs = make_pairs(renderer, step, batches[step], rows)
    ordered = [sorted(samples, key=lambda sample: sample.num_trained) for samples in pairs.samples_GN]
    return [[samples[0], samples[-1]] for samples in ordered]


def score_batch(
    scorer: Scorer,
    rewards: RewardScorer,
    step: int,
    batch: Sequence[Example],
    rows: dict[str, dict[str, Any]],
    part: Path,
) -> int:
    """Score a batch, write its part, return the number of pairs."""
    pairs = make_pairs(scorer.renderer, step, batch, rows)
    with RowsWriter(part, SCHEMA) as out:
        out.write(score_pairs(scorer, rewards, pairs))
    return len(batch) * len(pairs.responses)


def make_pairs(renderer: Renderer, step: int, batch: Sequence[Example], rows: dict[str, dict[str, Any]]) -> Pairs:
    """Render every prompt of a batch with all its responses; ValueError naming the row for which one does not fit."""
    chosen = [rows[example.row_id] for example in batch]
    places = [(row, place) for row, example in zip(chosen, batch, strict=True) for place in example.places]
    responses = [row["responses"][place] for row, place in places]
    truncated = [bool(row["truncated"]) and row["truncated"][place] for row, place in places]
    samples_GN = []
    for row in chosen:
        try:
            samples_GN.append(renderer.row(row["prompt"], responses, truncated))
        except UnusableRow as unusable:
            raise ValueError(
                f"score_cross, step {step}: the prompt of row {row['row_id']} with a response of another row: {unusable}; "
                "expected that every response of a batch fits under every prompt of it; raise max_tokens, or normalise in_batch"
            ) from unusable
    return Pairs(step, chosen, responses, samples_GN)


def score_pairs(scorer: Scorer, rewards: RewardScorer, pairs: Pairs) -> list[dict[str, Any]]:
    """Return a batch's rows of the matrices."""
    G, N = len(pairs.rows), len(pairs.responses)
    logps, _ = score_groups(scorer, pairs.samples_GN)
    row_ids = [row["row_id"] for row in pairs.rows]
    require_finite(
        dict(zip(row_ids, logps, strict=True)),
        of=f"reference {scorer.model.name_or_path}: got NaN or infinite log-probabilities under the prompts",
    )
    prompts = [row["prompt"] for row in pairs.rows for _ in pairs.responses]
    try:
        reward, _ = rewards.score(prompts, pairs.responses * G, budget=scorer.runtime.microbatch_tokens)
    except UnusableRow as unusable:
        _, refused = rewards.split([row | {"responses": pairs.responses} for row in pairs.rows])
        raise ValueError(
            f"score_cross, step {pairs.step}: row {refused[0]['row_id']}: {unusable}; expected that the reward model reads every "
            "response of a batch under every prompt of it"
        ) from unusable
    reward_GN = reward.reshape(G, N).tolist()
    require_finite(
        dict(zip(row_ids, reward_GN, strict=True)),
        of=f"reward model {rewards.model.name_or_path}: got NaN or infinite rewards under the prompts",
    )
    return [
        {"step": pairs.step, "row_id": row_id, "reward": reward_N, "logp": logp_N}
        for row_id, reward_N, logp_N in zip(row_ids, reward_GN, logps, strict=True)
    ]


def read_cross(folder: Path, batches: Sequence[Sequence[Example]]) -> dict[tuple[str, ...], Cross]:
    """Return the matrices of each batch by its row ids in order; ValueError for those of another batch plan."""
    stated = json.loads((folder / "manifest.json").read_text())["plan"]
    expected = digest_batches(batches)
    if stated != expected:
        raise ValueError(
            f"cross folder {folder}: the matrices are of the batch plan {stated[:12]}, this run's is {expected[:12]}; expected the "
            "same rows, seed, epochs, global batch and max_tokens; score the batches of this run"
        )
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(folder / "scores.parquet").to_pylist():
        found.setdefault(row["step"], []).append(row)
    return {
        tuple(row["row_id"] for row in rows): Cross(
            reward_GN=np.array([row["reward"] for row in rows]), logp_ref_GN=np.array([row["logp"] for row in rows])
        )
        for rows in found.values()
    }
