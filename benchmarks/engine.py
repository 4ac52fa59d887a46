"""Our engine and a plain loop, each timed over some optimiser steps on HH-RLHF pairs, in the process of `benchmarks.training`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.children import await_turn
from benchmarks.training import LONGEST_PAIR
from training.checkpoint import Progress
from training.config import (
    Device,
    Layout,
    Precision,
    ResponseRegime,
    Runtime,
    Schedule,
)
from training.data.batch import collate, cut, lay_out, plan_steps
from training.data.examples import Example
from training.data.ingest import run as ingest
from training.data.rows import iterate_rows
from training.devices import device_peak, name_device
from training.distributed import World
from training.flops import Flops, count_flops, read_windows
from training.job import Job
from training.logprobs import check_layout, sum_logps
from training.loop import Settings, Trainer, make_optimiser
from training.memory import keep_freed_memory, read_resident_peak
from training.model import prepare_layers, prepare_model, start_torch
from training.objectives.var import Normaliser, ReferenceFactor, Var
from training.plan import read_architecture
from training.render import Rendered, Renderer, UnusableRow
from training.steps import Steps
from training.train import PolicyForward

ORDER_SEED = 0  # of the rows: VAR's, which peers follow
SETTINGS = Settings(
    learning_rate=1e-6,
    weight_decay=0.0,
    schedule=Schedule.constant,
    warmup_fraction=0.0,
    max_grad_norm=1.0,
    precision=Precision.float32,
    seed=0,
)


@dataclass(frozen=True)
class Pair:
    """A usable row of HH-RLHF, as ingestion makes it and as it goes through the model."""

    row: dict[str, Any]
    samples: list[Rendered]  # both responses, in the row's order

    @property
    def chosen(self) -> Rendered:
        """The preferred response."""
        return self.samples[self.row["preferred"]]

    @property
    def longest(self) -> int:
        """Tokens of the longer response and its prompt."""
        return max(len(sample.ids_T) for sample in self.samples)


def measure_var(spec: dict[str, Any]) -> dict[str, Any]:
    """Time VAR steps through the engine's own loop, and the scoring of the reference before them.

    With `variants` (rows of another length or number of responses, layers compiled or not) their steps are taken in turn by one model, with
    the device's rate measured before, between and after all of them, and the result has a list of them.
    """
    tokenizer, model = open_model(spec)
    world = World(start_torch(Runtime(device=Device(spec["device"]))))
    model = prepare_model(model, tokenizer, Path(spec["model"])).to(world.device).eval()
    check_layout(model, [make_synthetic(256, 0, model).samples], layout=Layout.tree, device=world.device)
    variants = [spec | variant for variant in spec.get("variants", [{}])]
    pairs = [] if all("length" in variant for variant in variants) else pick_pairs(spec, tokenizer)
    # Step by step: the longest is there more than once, and equal prompts would be read once.
    scored = [] if "variants" in spec else order_pairs(spec, pairs)
    scoring = sum(score(model, step, spec, world) for step in scored)
    keep_freed_memory()  # as a run does
    lanes = make_lanes(variants, pairs, model, world)
    rates = take_steps(lanes, spec)
    described = [lane.describe(count_flops(model)) for lane in lanes]
    found = {
        "gemm_rate": float(np.median(rates)),
        **({"variants": described} if "variants" in spec else described[0]),
        "scoring_seconds": scoring,
        "scored_pairs": sum(map(len, scored)),
        "device": name_device(world.device),
        "peak_bytes": read_resident_peak(),  # before anything is profiled
        "peak_device_gib": max(lane.peak_gib for lane in lanes),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if spec.get("profile"):
        lanes[0].trainer.progress.step = 1
        found["profile"] = profile_step(lanes[0].trainer)
    return found


def make_lanes(variants: list[dict[str, Any]], pairs: list[Pair], model: Any, world: World) -> list["Lane"]:
    """Return a trainer of the same model and optimiser for each variant's rows; layers are compiled where one of them wants it."""
    spec = variants[0]
    settings = replace(SETTINGS, precision=Precision(spec["precision"]))
    runtime = Runtime(
        microbatch_tokens=10**9 if spec.get("one_microbatch") else spec["microbatch_tokens"],
        compile=any(variant.get("compile") for variant in variants),
        activation_checkpointing=spec.get("activation_checkpointing", False),
    )
    optimiser = make_optimiser(model, settings)
    forward = PolicyForward(world.device, Layout.tree, count_flops(model), read_windows(model.config))
    prepare_layers(model, runtime, device=world.device)
    folder = Path(spec["folder"])
    job = Job(name="train", config={}, runtime={}, inputs={}, output=folder, work=folder)
    lanes = []
    for variant in variants:
        work = make_steps(variant, make_examples(variant, pairs, model), forward)
        trainer = Trainer(model, optimiser, work, settings, runtime, job, Progress(), world)
        lanes.append(Lane(trainer, "force_eager" if runtime.compile and not variant.get("compile") else "default"))
    return lanes


def make_steps(spec: dict[str, Any], examples: list[Example], forward: PolicyForward) -> Steps:
    """Return VAR's steps over some rows: those that are timed, behind one that is not."""
    objective = Var(
        lambda_=1.0,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.mean,
    )
    per_step = len(examples) // (spec["steps"] + 1)
    return Steps(examples, objective, forward, batch_prompts=per_step, epochs=1, seed=ORDER_SEED)


@dataclass
class Lane:
    """A trainer beside others of the same model, and the seconds of its timed steps, which are all but the first."""

    trainer: Trainer
    stance: str  # torch.compile's: force_eager where the model's layers are compiled, but not for this lane
    seconds: list[float] = field(default_factory=list)  # of a step; on a GPU of all together
    peak_gib: float = 0.0  # of all steps, those that warm up too; on a GPU of tensors

    def take_steps(self, count: int = 1) -> float:
        """Take the next steps one after the other and return their seconds."""
        device = self.trainer.world.device
        with torch.compiler.set_stance(self.stance):
            started = read_clock(device)
            for _ in range(count):
                figures = self.trainer.take_step()
                assert figures is not None, "nobody asks it to stop"
                self.peak_gib = max(self.peak_gib, figures["train/peak_memory_gib"])
            return read_clock(device) - started

    def describe(self, count: Flops | None) -> dict[str, Any]:
        """Return what the timed steps took and what went through the model; `flops` are of use (training/flops.py): no padding, no masked
        pair of attention, nothing that is computed a second time. Of these, `attention_flops`."""
        work, done = self.trainer.work, self.trainer.progress
        assert isinstance(work, Steps)
        steps = range(1, done.step)
        positions = sum(sample.num_trained for step in steps for sample in work.samples(step))
        others = count.step(tokens=done.tokens, positions=positions, segments=[]) if count else done.flops
        return {
            "seconds": sum(self.seconds),
            "step_seconds": self.seconds,
            "pairs": sum(len(work.rows(step)) for step in steps),
            "tokens": done.tokens,
            "flops": done.flops,
            "attention_flops": done.flops - others,
            "microbatches": max((len(work.cut(step, budget=self.trainer.budget)) for step in steps), default=0),
        }


def take_steps(lanes: list[Lane], spec: dict[str, Any]) -> list[float]:
    """Warm up on the longest of all steps, then let the lanes take their steps in turn; return the device's rates, measured before, between
    and after them."""
    world, precision = lanes[0].trainer.world, lanes[0].trainer.settings.precision
    measure = gemm_rate if world.device.type == "cpu" else lambda: device_peak(world.device, precision) or np.nan
    warming = {lane.stance: lane for lane in lanes}  # the last, which is the largest, of those that run the same code
    for _ in range(spec["warming_steps"]):
        await_turn(spec)
        for lane in warming.values():
            work = lane.trainer.work
            assert isinstance(work, Steps)
            lengths = [sum(len(sample.ids_T) for sample in work.samples(step)) for step in range(work.num_steps)]
            lane.trainer.progress.step = int(np.argmax(lengths))
            lane.take_steps()
    for lane in lanes:
        lane.trainer.progress = Progress(step=1)
    rates = [measure()]
    # A GPU is still at a step's last kernels when the next step is laid out: its steps are not waited for one by one.
    at_once = max(1, spec["steps"]) if world.device.type == "cuda" else 1
    for _ in range(0, spec["steps"], at_once):
        await_turn(spec)
        for lane in lanes:
            lane.seconds.append(lane.take_steps(at_once))
            rates.append(measure())
    return rates


def profile_step(trainer: Trainer, longest: int = 25) -> dict[str, float]:
    """Return the seconds of a step by what a device spends its time on, the longest first, and `step`, all of it by the clock."""
    cuda = trainer.world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        started = read_clock(trainer.world.device)
        trainer.take_step()
        seconds = read_clock(trainer.world.device) - started
    # Of a GPU its kernels: what launched them, and what they are marked with, counts their time once more.
    spent = {
        event.key[:90]: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
        if not cuda or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
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
    """Time a plain PyTorch loop for SFT on the chosen, with every micro-batch in turn on the same step's rows: rows of like length together,
    logits where the response is predicted. Return seconds of a pair by micro-batch, and its `flops`."""
    tokenizer, model = open_model(spec)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def take_step(pairs: list[Pair], size: int) -> float:
        started = time.monotonic()
        batch = sorted((pair.chosen for pair in pairs), key=lambda sample: len(sample.ids_T))
        count = sum(sample.num_trained for sample in batch)
        for begin in range(0, len(batch), size):
            micro = collate(batch[begin : begin + size], device=torch.device("cpu"))
            hidden = model.base_model(input_ids=micro.ids_BT, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[micro.predictor_P])
            (torch.nn.functional.cross_entropy(logits, micro.target_P, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return time.monotonic() - started

    all_steps = order_pairs(spec, pick_pairs(spec, tokenizer))
    warming, steps = all_steps[: spec["warming_steps"]], all_steps[spec["warming_steps"] :]
    for pairs in warming:
        await_turn(spec)
        take_step(pairs, spec["batch_pairs"])
    seconds = dict.fromkeys(spec["microbatches"], 0.0)
    for pairs in steps:
        await_turn(spec)
        for size in seconds:
            seconds[size] += take_step(pairs, size)
    count, num_pairs = count_flops(model), spec["batch_pairs"] * spec["steps"]
    assert count is not None
    all_rows = collate([pair.chosen for pairs in steps for pair in pairs], device=torch.device("cpu"))
    flops = count.step(tokens=all_rows.num_tokens, positions=len(all_rows.target_P), segments=all_rows.spans)
    return {
        "seconds_per_pair": {size: total / num_pairs for size, total in seconds.items()},
        "flops_per_pair": flops / num_pairs,
    }


def score(model: Any, pairs: Sequence[Pair | Example], spec: dict[str, Any], world: World) -> float:
    """Return the seconds that the reference's log-probabilities of some pairs take."""
    samples = [sample for pair in pairs for sample in pair.samples]
    group_R = np.repeat(np.arange(len(pairs)), 2)
    started = read_clock(world.device)
    with torch.inference_mode(), world.autocast(Precision(spec["precision"])):
        for members in cut(samples, group_R, budget=spec["microbatch_tokens"], whole_groups=False, layout=Layout.tree):
            chosen = [samples[index] for index in members]
            sum_logps(model, lay_out(chosen, group_R[members], device=world.device, layout=Layout.tree))
    return read_clock(world.device) - started


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


def pick_pairs(spec: dict[str, Any], tokenizer: Any) -> list[Pair]:
    """Return the pairs that all methods train on: a batch for every step that is timed and one before. ValueError where there are too few."""
    renderer = Renderer(tokenizer, max_tokens=LONGEST_PAIR)
    wanted = spec["batch_pairs"] * (spec["steps"] + 1)
    pairs: list[Pair] = []
    for row in read_pairs(spec):
        try:
            pairs.append(Pair(row, renderer.row(row["prompt"], row["responses"], row["truncated"])))
        except UnusableRow:
            continue
        if len(pairs) == wanted:
            return pairs
    raise ValueError(
        f"{spec['data']}: {len(pairs)} usable pairs of at most {LONGEST_PAIR} tokens; expected {wanted}, {spec['batch_pairs']} for each "
        "step and for one before; give more rows, or time fewer steps"
    )


def order_pairs(spec: dict[str, Any], pairs: list[Pair]) -> list[list[Pair]]:
    """Return the pairs of every step, the same in each as VAR's: what peers train on. The first, which warm up, are the longest of all."""
    plan = plan_steps(len(pairs), batch_prompts=spec["batch_pairs"], epochs=1, seed=ORDER_SEED)
    steps = [[pairs[index] for index in step] for step in plan]
    longest = max(steps, key=lambda step: sum(len(sample.ids_T) for pair in step for sample in pair.samples))
    return [*[longest] * spec["warming_steps"], *steps[1:]]


def make_examples(spec: dict[str, Any], pairs: list[Pair], model: Any) -> list[Example]:
    """Return a variant's rows: pairs as they are, or with more responses, or synthetic ones of another length."""
    if length := spec.get("length"):
        return [make_synthetic(length, index, model) for index in range(spec["pairs"] * (spec["steps"] + 1))]
    groups = [pair.samples for pair in pairs]
    if wanted := spec.get("responses"):
        groups = [add_responses(group, groups[n:] + groups[:n], wanted) for n, group in enumerate(groups)]
    return [make_example(f"row{n}", group) for n, group in enumerate(groups)]


def read_pairs(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return HH-RLHF pairs as ingestion makes them."""
    folder = Path(spec["folder"]) / "rows"
    (folder / "work").mkdir(parents=True)
    config = {"responses": "support", "limit": 50 * spec["batch_pairs"], "max_invalid_fraction": 0.5}
    source = {"source": Path(spec["data"]) / "helpful-base"}
    ingest(Job(name="ingest", config=config, runtime={}, inputs=source, output=folder, work=folder / "work"))
    return iterate_rows(folder, split="train")


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


def make_synthetic(length: int, index: int, model: Any) -> Example:
    """Return a pair of `length` tokens in all: a prompt of 70 %, as in HH-RLHF, and two responses."""
    rng = np.random.default_rng(index)
    prompt, response = int(0.7 * length), int(0.15 * length)
    ids = rng.integers(100, model.config.vocab_size, size=prompt + 2 * response).astype(np.int32)
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
