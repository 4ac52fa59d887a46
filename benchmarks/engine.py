"""Our engine and a plain loop, each timed over some optimiser steps on HH-RLHF pairs, in the process of `benchmarks.training`."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import BATCH_PAIRS, LONGEST_PAIR, MICROBATCH_TOKENS
from training.checkpoint import Progress
from training.config import (
    Layout,
    Normaliser,
    Precision,
    ReferenceFactor,
    ResponseRegime,
    Runtime,
    Schedule,
)
from training.data.batch import collate, cut, lay_out
from training.data.examples import Example
from training.data.ingest import run as ingest
from training.data.rows import read_rows
from training.job import Job
from training.logprobs import check_layout, sum_logps
from training.loop import Settings, Trainer, make_optimiser
from training.model import load_policy
from training.objectives.var import Var
from training.render import Rendered, Renderer, UnusableRow
from training.steps import Steps
from training.train import PolicyForward

CPU = torch.device("cpu")
SETTINGS = Settings(
    learning_rate=1e-6,
    weight_decay=0.0,
    schedule=Schedule.constant,
    warmup_fraction=0.0,
    max_grad_norm=1.0,
    precision=Precision.float32,
    seed=0,
)


def measure_var(spec: dict[str, Any]) -> dict[str, Any]:
    """Time VAR steps through the engine's own loop, and the scoring of the reference before them."""
    model, tokenizer = load_policy(Path(spec["model"]), precision=Precision.float32, device=CPU)
    examples = make_examples(spec, Renderer(tokenizer, max_tokens=8192))
    check_layout(model, [examples[0].samples[:2]], layout=Layout.tree, device=CPU)
    scoring, scored = score(model, examples[:BATCH_PAIRS])
    objective = Var(
        lambda_=1.0,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.mean,
    )
    per_step = len(examples) // (spec["steps"] + 1)
    work = Steps(examples, objective, PolicyForward(CPU, Layout.tree), batch_prompts=per_step, epochs=1, seed=0)
    budget = 10**9 if spec.get("one_microbatch") else MICROBATCH_TOKENS
    job = Job(name="train", config={}, runtime={}, inputs={}, output=Path(spec["scratch"]), work=Path(spec["scratch"]))
    runtime = Runtime(microbatch_tokens=budget)
    trainer = Trainer(model, make_optimiser(model, SETTINGS), work, SETTINGS, runtime, job, Progress())
    trainer.take_step()
    rates, seconds, tokens = [gemm_rate()], 0.0, trainer.progress.tokens
    for _ in range(spec["steps"]):
        started = time.monotonic()
        trainer.take_step()
        seconds += time.monotonic() - started
        rates.append(gemm_rate())
    return {
        "seconds": seconds,
        "pairs": per_step * spec["steps"],
        "tokens": trainer.progress.tokens - tokens,
        "flops": count_flops(model, work, range(1, spec["steps"] + 1), budget=budget),
        "gemm_rate": float(np.median(rates)),
        "scoring_seconds": scoring,
        "scored_pairs": scored,
    }


def measure_plain_sft(spec: dict[str, Any]) -> dict[str, Any]:
    """Time a plain PyTorch loop for SFT on the chosen: rows of like length together, logits where the response is predicted."""
    model, tokenizer = load_policy(Path(spec["model"]), precision=Precision.float32, device=CPU)
    examples = make_examples(spec, Renderer(tokenizer, max_tokens=8192))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    chosen = [example.samples[0] for example in examples]
    seconds = 0.0
    for step in range(spec["steps"] + 1):
        started = time.monotonic()
        batch = sorted(chosen[step * BATCH_PAIRS : (step + 1) * BATCH_PAIRS], key=lambda sample: len(sample.ids_T))
        count = sum(sample.num_trained for sample in batch)
        for begin in range(0, BATCH_PAIRS, 4):
            micro = collate(batch[begin : begin + 4], device=CPU)
            hidden = model.base_model(input_ids=micro.ids_BT, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[micro.predictor_P])
            (torch.nn.functional.cross_entropy(logits, micro.target_P, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds += (time.monotonic() - started) * (step > 0)
    return {"seconds": seconds, "pairs": BATCH_PAIRS * spec["steps"]}


def score(model: Any, examples: list[Example]) -> tuple[float, int]:
    """Return the seconds that the reference's log-probabilities of some rows take, and their number."""
    samples = [sample for example in examples for sample in example.samples]
    group_R = np.repeat(np.arange(len(examples)), [len(example.samples) for example in examples])
    started = time.monotonic()
    with torch.inference_mode():
        for members in cut(samples, group_R, budget=MICROBATCH_TOKENS, whole_groups=False, layout=Layout.tree):
            chosen = [samples[index] for index in members]
            sum_logps(model, lay_out(chosen, group_R[members], device=CPU, layout=Layout.tree))
    return time.monotonic() - started, len(examples)


def count_flops(model: Any, work: Steps, steps: range, *, budget: int) -> float:
    """Return the floating-point operations of some steps, forward and backward, as PyTorch's own counter sees them."""
    with FlopCounterMode(display=False) as counter:
        for step in steps:
            for members in work.cut(step, budget=budget):
                work.part(model, step, members).loss.backward()
    return float(counter.get_total_flops())


def gemm_rate(size: int = 2048, repeats: int = 3) -> float:
    """Return the FLOPs per second of a large float32 matrix product, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(repeats):
        started = time.monotonic()
        a @ b
        best = max(best, 2 * size**3 / (time.monotonic() - started))
    return best


# --- rows ---


def make_examples(spec: dict[str, Any], renderer: Renderer) -> list[Example]:
    """Return BATCH_PAIRS rows a step, one step more than is timed: pairs as they are, or with more responses or other lengths."""
    count = BATCH_PAIRS * (spec["steps"] + 1)
    if length := spec.get("length"):
        return [make_synthetic(length, index) for index in range(max(1, 4096 // length) * (spec["steps"] + 1))]
    groups = []
    for row in read_pairs(spec):
        try:
            samples = renderer.row(row["prompt"], row["responses"], row["truncated"])
        except UnusableRow:
            continue
        if max(len(sample.ids_T) for sample in samples) <= LONGEST_PAIR:
            groups.append(samples)
        if len(groups) == count:
            break
    if wanted := spec.get("responses"):
        groups = [add_responses(group, groups[n:] + groups[:n], wanted) for n, group in enumerate(groups)]
    return [make_example(f"row{n}", group) for n, group in enumerate(groups)]


def read_pairs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield HH-RLHF pairs as ingestion makes them."""
    folder = Path(spec["scratch"]) / "rows"
    if not (folder / "rows.parquet").exists():
        (folder / "work").mkdir(parents=True, exist_ok=True)
        config = {"responses": "support", "limit": 400, "max_invalid_fraction": 0.5}
        source = {"source": Path(spec["data"]) / "helpful-base"}
        ingest(Job(name="ingest", config=config, runtime={}, inputs=source, output=folder, work=folder / "work"))
    for batch in read_rows(folder, split="train"):
        yield from batch.to_pylist()


def add_responses(group: list[Rendered], others: list[list[Rendered]], wanted: int) -> list[Rendered]:
    """Return a group with responses of other rows put under its prompt, until it has as many as wanted."""
    first = group[0]
    prompt = first.ids_T[: first.start]
    foreign = (sample for other in others[1:] for sample in other)
    grown = list(group[:wanted])
    while len(grown) < wanted:
        other = next(foreign)
        grown.append(Rendered(ids_T=np.concatenate([prompt, other.ids_T[other.start :]]), start=first.start))
    return grown


def make_synthetic(length: int, index: int) -> Example:
    """Return a pair of `length` tokens in all: a prompt of 70 %, as in HH-RLHF, and two responses."""
    rng = np.random.default_rng(index)
    prompt, response = int(0.7 * length), int(0.15 * length)
    ids = rng.integers(100, 40_000, size=prompt + 2 * response).astype(np.int32)
    first, second = ids[: prompt + response], np.r_[ids[:prompt], ids[prompt + response :]]
    return make_example(f"row{index}", [Rendered(ids_T=part, start=prompt) for part in (first, second)])


def make_example(row_id: str, samples: list[Rendered]) -> Example:
    """Return a row with random rewards and log-probabilities, which cost nothing and change no shape."""
    rng = np.random.default_rng(len(row_id))
    num_tokens_K = np.array([sample.num_trained for sample in samples])
    return Example(
        row_id=row_id,
        samples=tuple(samples),
        places=tuple(range(len(samples))),
        num_responses=len(samples),
        num_tokens_K=num_tokens_K,
        reward_K=rng.normal(size=len(samples)),
        logp_ref_K=-2.0 * num_tokens_K,
    )
