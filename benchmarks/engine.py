"""Our engine and a plain loop, each timed over some optimiser steps on HH-RLHF pairs, in the process of `benchmarks.training`."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.training import LONGEST_PAIR
from training.checkpoint import Progress
from training.config import (
    Layout,
    Precision,
    ResponseRegime,
    Runtime,
    Schedule,
)
from training.data.batch import collate, cut, lay_out
from training.data.examples import Example
from training.data.ingest import run as ingest
from training.data.rows import read_rows
from training.devices import device_peak, name_device
from training.distributed import World
from training.flops import count_flops
from training.job import Job
from training.logprobs import check_layout, sum_logps
from training.loop import Settings, Trainer, make_optimiser
from training.memory import keep_freed_memory, read_resident_peak
from training.model import prepare_layers, prepare_model
from training.objectives.var import Normaliser, ReferenceFactor, Var
from training.plan import read_architecture
from training.render import Rendered, Renderer, UnusableRow
from training.steps import Steps
from training.train import PolicyForward

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
    tokenizer, model = open_model(spec)
    world = World(torch.device(spec["device"]))
    settings = replace(SETTINGS, precision=Precision(spec["precision"]))
    model = prepare_model(model, tokenizer, Path(spec["model"])).to(world.device).eval()
    examples = make_examples(spec, Renderer(tokenizer, max_tokens=8192))
    check_layout(model, [examples[0].samples[:2]], layout=Layout.tree, device=world.device)
    scoring, scored = score(model, examples[: spec["batch_pairs"]], spec)
    objective = Var(
        lambda_=1.0,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.mean,
    )
    per_step = len(examples) // (spec["steps"] + 1)
    forward = PolicyForward(world.device, Layout.tree, count_flops(model))
    work = Steps(examples, objective, forward, batch_prompts=per_step, epochs=1, seed=0)
    budget = 10**9 if spec.get("one_microbatch") else spec["microbatch_tokens"]
    folder = Path(spec["folder"])
    job = Job(name="train", config={}, runtime={}, inputs={}, output=folder, work=folder)
    runtime = Runtime(
        microbatch_tokens=budget,
        compile=spec.get("compile", False),
        activation_checkpointing=spec.get("activation_checkpointing", False),
    )
    keep_freed_memory()  # as a run does
    prepare_layers(model, runtime, device=world.device)
    progress = Progress()
    trainer = Trainer(model, make_optimiser(model, settings), work, settings, runtime, job, progress, world)
    trainer.take_step()
    gemm = gemm_rate if world.device.type == "cpu" else lambda: device_peak(world.device, settings.precision) or np.nan
    rates, seconds, before = [gemm()], 0.0, replace(progress)
    for _ in range(spec["steps"]):
        started = read_clock(world.device)
        trainer.take_step()
        seconds += read_clock(world.device) - started
        rates.append(gemm())
    found = {
        "seconds": seconds,
        "pairs": per_step * spec["steps"],
        "tokens": progress.tokens - before.tokens,
        "row_tokens": sum(len(s.ids_T) for step in range(1, spec["steps"] + 1) for s in work.samples(step)),
        "useful_flops": progress.flops - before.flops,
        "gemm_rate": float(np.median(rates)),
        "scoring_seconds": scoring,
        "scored_pairs": scored,
        "device": name_device(world.device),
        "peak_bytes": read_resident_peak(),  # before anything is counted or profiled
        "peak_device_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if spec.get("profile"):
        progress.step = 1
        found["profile"] = profile_step(trainer)
    if world.device.type == "cpu":
        found["flops"] = count_all_flops(model, work, range(1, spec["steps"] + 1), budget=budget)
    return found


def profile_step(trainer: Trainer, longest: int = 25) -> dict[str, float]:
    """Return the seconds of a step by what a device spends its time on, the longest first, and `step`, all of it by the clock."""
    cuda = trainer.world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        started = read_clock(trainer.world.device)
        trainer.take_step()
        seconds = read_clock(trainer.world.device) - started
    # Of a GPU its kernels: what launched them counts their time once more.
    spent = {
        event.key[:90]: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
        if not cuda or event.device_type == DeviceType.CUDA
    }
    ranked = sorted(spent.items(), key=lambda item: -item[1])
    return {"step": seconds, "all": sum(spent.values()), **dict(ranked[:longest])}


def read_clock(device: torch.device) -> float:
    """Return seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def open_model(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Return (tokenizer, model) in float32: of the folder, or, as no rate depends on weights, random ones of an architecture."""
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    if architecture := spec.get("architecture"):
        torch.manual_seed(0)
        with torch.device(spec["device"]):
            return tokenizer, AutoModelForCausalLM.from_config(
                read_architecture(Path(architecture)), dtype=torch.float32
            )
    return tokenizer, AutoModelForCausalLM.from_pretrained(
        spec["model"], local_files_only=True, use_safetensors=True, dtype=torch.float32
    )


def measure_plain_sft(spec: dict[str, Any]) -> dict[str, Any]:
    """Time a plain PyTorch loop for SFT on the chosen: rows of like length together, logits where the response is predicted."""
    tokenizer, model = open_model(spec)
    examples = make_examples(spec, Renderer(tokenizer, max_tokens=8192))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    chosen = [example.samples[0] for example in examples]
    seconds = 0.0
    for step in range(spec["steps"] + 1):
        started = time.monotonic()
        pairs = spec["batch_pairs"]
        batch = sorted(chosen[step * pairs : (step + 1) * pairs], key=lambda sample: len(sample.ids_T))
        count = sum(sample.num_trained for sample in batch)
        for begin in range(0, pairs, 4):
            micro = collate(batch[begin : begin + 4], device=torch.device("cpu"))
            hidden = model.base_model(input_ids=micro.ids_BT, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[micro.predictor_P])
            (torch.nn.functional.cross_entropy(logits, micro.target_P, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds += (time.monotonic() - started) * (step > 0)
    return {"seconds": seconds, "pairs": spec["batch_pairs"] * spec["steps"]}


def score(model: Any, examples: list[Example], spec: dict[str, Any]) -> tuple[float, int]:
    """Return the seconds that the reference's log-probabilities of some rows take, and their number."""
    samples = [sample for example in examples for sample in example.samples]
    group_R = np.repeat(np.arange(len(examples)), [len(example.samples) for example in examples])
    device, narrow = torch.device(spec["device"]), spec["precision"] == Precision.bfloat16
    started = read_clock(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=narrow):
        for members in cut(samples, group_R, budget=spec["microbatch_tokens"], whole_groups=False, layout=Layout.tree):
            chosen = [samples[index] for index in members]
            sum_logps(model, lay_out(chosen, group_R[members], device=device, layout=Layout.tree))
    return read_clock(device) - started, len(examples)


def count_all_flops(model: Any, work: Steps, steps: range, *, budget: int) -> float:
    """Return the floating-point operations of some steps, forward and backward, as PyTorch's own counter sees them."""
    with FlopCounterMode(display=False) as counter:
        for step in steps:
            for members in work.cut(step, budget=budget):
                work.part(model, work.load(step, members)).loss.backward()
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
    """Return the batch's rows for every step, one step more than is timed: pairs as they are, or with more responses or other lengths."""
    count = spec["batch_pairs"] * (spec["steps"] + 1)
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
    folder = Path(spec["folder"]) / "rows"
    (folder / "work").mkdir(parents=True)
    config = {"responses": "support", "limit": 50 * spec["batch_pairs"], "max_invalid_fraction": 0.5}
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
