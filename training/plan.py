"""What a training run will take, from the policy's config alone: parameters, memory of each rank, steps, hours and money.

The policy is built on torch's meta device, so weights are neither read nor made: a model of any size is planned in seconds.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.config import Layout, LoraConfig, Runtime
from training.data.batch import count_steps, split_group
from training.data.manifest import read_rows_manifest
from training.data.rows import iterate_rows
from training.data.stems import WORTH, count_beginning
from training.devices import ACCELERATORS, find_accelerator, find_price, measure_gemm
from training.flops import count_flops
from training.lora import add_adapter
from training.memory import (
    FLOAT32,
    GIB,
    Footprint,
    MicroBatchSize,
    count_trained,
    estimate_footprint,
    measure_free,
    show_bytes,
)
from training.model import LOCAL, require_text
from training.objectives.objective import TrainConfig
from training.render import Rendered, Renderer, UnusableRow

ARCHITECTURES = Path(__file__).with_name("architectures")
ASSUMED_MFU = 0.4
ASSUMED_ROWS = 10_000
ASSUMED_TOKENS = 512
SAMPLED_ROWS = 500
CHARS_PER_TOKEN = 4.0
MOST_RANKS = 65_536


Shape = tuple[int, tuple[int, ...]]  # of a row: prompt tokens, trained tokens of each response


@dataclass(frozen=True)
class Workload:
    """The rows of the train split: how many, and the shapes of some of them."""

    rows: int
    shapes: tuple[Shape, ...]
    basis: str  # where this is known from
    stem: int = 0  # tokens that all prompts begin with, as a system prompt

    def tokens(self, layout: Layout) -> float:
        """Return the mean tokens of a row through the model, padding not counted, where no other row shares any with it."""
        return sum(count_row(prompt, responses, layout) for prompt, responses in self.shapes) / len(self.shapes)


@dataclass(frozen=True)
class Machine:
    """What trains: the rate and memory of one of `ranks` equal devices, its price, and where these are known from.

    Ranks on CPUs share those of their machine: a rank has its part of the machine's rate and memory.
    """

    name: str
    ranks: int
    replicas: int  # whole sharded models that the ranks hold together
    peak_flops: float
    mfu: float
    memory_bytes: int
    devices: int  # that are paid for: one a rank, and one a machine where it computes on its CPUs
    usd_per_hour: float | None  # of a device
    basis: str
    price_basis: str


@dataclass(frozen=True)
class Mfu:
    """A share of a device's peak that becomes training, and where it is known from."""

    value: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    model_type: str
    parameters: int
    trained_parameters: int  # those of the adapter alone, with LoRA
    layers: int
    rows: int
    tokens_per_row: float
    data_basis: str
    steps: int
    tokens: int
    microbatch_tokens: int
    footprint: Footprint  # of each rank
    export_bytes: int  # of the first machine's memory, where several ranks' parts are put together to be written
    flops: int
    machine: Machine
    ranks_with_room: int | None  # that would do where these have none; None on CPUs, and where no number would
    parts: float  # that a step can be cut into, on average
    hours: float
    usd: float | None

    @property
    def fits(self) -> bool:
        """Whether a rank has room for its share."""
        return self.footprint.total <= self.machine.memory_bytes

    @property
    def busy_share(self) -> float:
        """The share of the ranks' time in which they have a part of a step."""
        return share_busy(self.parts, ranks=self.machine.ranks)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        found = {"fits": self.fits, "bytes_per_rank": self.footprint.total, "busy_share": self.busy_share}
        return asdict(self) | found


def read_architecture(path: Path) -> Any:
    """Return the config in a folder's config.json, or in a file of that form. ValueError where there is none to build from, and for a model
    of more than text."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"architecture {path}: got no config.json; expected a folder that holds one, or such a file; give "
            f"architecture:NAME for one of {', '.join(list_architectures())}"
        )
    values = json.loads(file.read_text())
    if "model_type" not in values:
        raise ValueError(f"{file}: got no model_type; expected a config as save_pretrained writes it; check the file")
    values.pop("quantization_config", None)  # training starts from plain weights
    config = AutoConfig.for_model(**values)
    require_text(config, path)
    return config


def list_architectures() -> list[str]:
    """Return the names of the architectures that come with varflow."""
    return sorted(path.stem for path in ARCHITECTURES.glob("*.json"))


def build_on_meta(config: Any, lora: LoraConfig | None = None) -> Any:
    """Return the causal language model of a config, without weights, with the adapter that is to be trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
        if lora is not None and lora.rank:
            add_adapter(model, lora)
    return model


def assume_workload(rows: int | None, tokens: int | None) -> Workload:
    """Return rows of which half is the prompt and a quarter each of two responses."""
    count, size = rows or ASSUMED_ROWS, tokens or ASSUMED_TOKENS
    if size < 8:
        raise ValueError(f"--tokens: got {size}, expected at least 8: a prompt and two responses")
    responses = (size // 4, size // 4)
    prompt = size - sum(responses)
    how = "given" if rows and tokens else "assumed" if not (rows or tokens) else "partly assumed"
    basis = f"{how}: a prompt of {prompt} tokens and 2 responses of {responses[0]}"
    return Workload(count, ((prompt, responses),), basis)


def measure_workload(folder: Path, config: TrainConfig, *, tokenizer_folder: Path | None) -> Workload:
    """Return the shapes of a rows folder's train split, of SAMPLED_ROWS evenly spread; tokens by the policy's own chat template.

    Without a tokenizer a token is taken for CHARS_PER_TOKEN characters. Rows that training would drop are left out.
    """
    rows = list(iterate_rows(folder, split="train"))
    select, min_responses = config.choose_responses(read_rows_manifest(folder).regime)
    sampled = rows[:: max(1, len(rows) // SAMPLED_ROWS)]
    renderer = None
    if tokenizer_folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **LOCAL)
        renderer = Renderer(tokenizer, max_tokens=config.max_tokens)
    chosen = ((row, select(row)) for row in sampled)
    usable = [(row, places) for row, places in chosen if len(places) >= min_responses]
    shapes, stem = shape_rows(usable, renderer) if renderer else ([guess_shape(*pair) for pair in usable], 0)
    if not shapes:
        raise ValueError(
            f"rows folder {folder}: none of {len(sampled)} rows of the train split can be trained; expected some; raise "
            "train.max_tokens or look at the rows"
        )
    how = "the policy's tokenizer" if renderer else f"{CHARS_PER_TOKEN:g} characters a token, as there is no tokenizer"
    shared = f"; all prompts begin with the same {stem}" if stem else ""
    basis = f"measured on {len(sampled)} of the {len(rows)} rows of the ingest artifact, by {how}{shared}"
    return Workload(round(len(rows) * len(shapes) / len(sampled)), tuple(shapes), basis, stem)


def shape_rows(rows: Sequence[tuple[dict[str, Any], Sequence[int]]], renderer: Renderer) -> tuple[list[Shape], int]:
    """Return the shapes of rows with the places of their responses, less those that training drops, and the tokens that all their prompts
    share."""
    groups: list[list[Rendered]] = []
    for row, places in rows:
        with suppress(UnusableRow):
            groups.append(renderer.stored(row, places))
    if not groups:
        return [], 0
    shapes = [(group[0].start, tuple(sample.num_trained for sample in group)) for group in groups]
    prompts = [group[0].ids_T[: group[0].start] for group in groups]
    return shapes, count_beginning(prompts)


def guess_shape(row: dict[str, Any], places: Sequence[int]) -> Shape:
    """Return the shape of a row by its characters."""
    prompt = sum(len(turn["content"]) for turn in row["prompt"])
    sizes = (math.ceil(len(row["responses"][k]) / CHARS_PER_TOKEN) + 1 for k in places)
    return math.ceil(prompt / CHARS_PER_TOKEN) + 1, tuple(sizes)


def count_row(prompt: int, responses: Sequence[int], layout: Layout) -> int:
    """Return the tokens of a row through the model: the prompt once in trees, with each response in rows; of a response all but the last."""
    return prompt * (1 if layout == Layout.tree else len(responses)) + sum(responses) - len(responses)


def choose_machine(
    name: str,
    config: TrainConfig,
    runtime: Runtime,
    *,
    ranks: int | None = None,
    mfu: Mfu | None = None,
    usd_per_hour: float | None = None,
) -> Machine:
    """Return the machine of a name of the table, or `cpu`: this one, whose rate is measured and whose free memory is taken.

    It has the runtime's ranks, or so many on as many machines. ValueError for ranks that its machines or replicas do not divide.
    """
    share = mfu or Mfu(ASSUMED_MFU, "assumed")
    ranks = runtime.world_size if ranks is None else ranks
    if not (0 < share.value <= 1 and ranks >= 1):
        raise ValueError(f"--mfu {share.value}, --ranks {ranks}: expected a share above 0 up to 1, and at least 1 rank")
    for setting, parts in (("nodes", runtime.nodes), ("replicas", runtime.replicas)):
        if ranks % parts:
            raise ValueError(
                f"runtime.{setting}: got {parts} for {ranks} ranks; expected a divisor of the number of ranks; give --ranks, or set "
                f"runtime.{setting}"
            )
    said = f"{share.value:.2%} of it, {share.basis}"
    price = find_price(name, given=usd_per_hour)
    usd, paid = (price.usd_per_hour, price.basis) if price else (None, "no price known")
    if name == "cpu":
        together = ranks // runtime.nodes
        threads = None if runtime.threads is None else runtime.threads * together
        rate, memory = measure_gemm(threads) / together, measure_free(torch.device("cpu")) // together
        part = "" if together == 1 else f"one of {together} parts of the "
        on = "" if threads is None else f" on {threads} thread{'s' if threads > 1 else ''}"
        basis = f"{part}float32 rate measured here{on}, {said}"
        return Machine("cpu", ranks, runtime.replicas, rate, share.value, memory, runtime.nodes, usd, basis, paid)
    found = find_accelerator(name)
    if found is None:
        known = ", ".join(device.name for device in ACCELERATORS)
        raise ValueError(f"--device {name!r}: not in the table; expected cpu or one of {known}")
    basis = f"{config.precision.value} peak of the data sheet, {said}"
    rate, memory = found.peak_flops(config.precision), int(found.memory_gib * GIB)
    return Machine(found.name, ranks, runtime.replicas, rate, share.value, memory, ranks, usd, basis, paid)


def plan_training(model: Any, config: TrainConfig, runtime: Runtime, work: Workload, machine: Machine) -> Plan:
    """Return what training a model (of any device, meta too) on a workload takes.

    Operations are those of training.flops; memory is the formula of training.memory for a micro-batch
    of `size_microbatch`. Hours are operations / (ranks x busy share x a rank's rate x MFU), USD hours x devices x price. ValueError for a
    model whose operations cannot be counted.
    """
    counted = count_flops(model)
    if counted is None:
        raise ValueError(
            f"model type {model.config.model_type}: its operations cannot be counted (experts, latent attention); expected a dense "
            "decoder; not supported"
        )
    layout, rows = runtime.layout, len(work.shapes)
    parts = list_parts(config, runtime, work)
    stem, together = share_stem(config, runtime, work, ranks=machine.ranks)
    spared = len(parts) / rows * (1 - 1 / together)  # stems of a row that others bring
    tokens = sum(count_row(*part, layout) for part in parts) / rows - stem * spared
    steps = count_steps(work.rows, batch_prompts=config.batch_prompts) * config.epochs
    all_parts = sum(
        counted.step(
            tokens=count_row(prompt, group, layout), positions=sum(group), segments=list_spans(prompt, group, layout)
        )
        for prompt, group in parts
    )
    of_row = all_parts / rows - counted.step(tokens=stem, positions=0, segments=[(0, stem)]) * spared
    flops = round(of_row * work.rows * config.epochs)
    footprint = partial(estimate_rank, model, config, runtime, work, machine)
    parts_a_step = count_parts(config, runtime, work)
    busy = share_busy(parts_a_step, ranks=machine.ranks)
    hours = flops / (machine.ranks * busy * machine.peak_flops * machine.mfu) / 3600
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Plan(
        model_type=model.config.model_type,
        parameters=parameters,
        trained_parameters=count_trained(model),
        layers=model.config.num_hidden_layers,
        rows=work.rows,
        tokens_per_row=tokens,
        data_basis=work.basis,
        steps=steps,
        tokens=round(tokens * work.rows * config.epochs),
        microbatch_tokens=size_microbatch(config, runtime, work, ranks=machine.ranks).tokens,
        footprint=footprint(ranks=machine.ranks),
        export_bytes=FLOAT32 * parameters if machine.ranks > 1 else 0,
        flops=flops,
        machine=machine,
        ranks_with_room=None if machine.name == "cpu" else find_ranks(footprint, machine),
        parts=parts_a_step,
        hours=hours,
        usd=None if machine.usd_per_hour is None else hours * machine.devices * machine.usd_per_hour,
    )


def size_microbatch(config: TrainConfig, runtime: Runtime, work: Workload, *, ranks: int) -> MicroBatchSize:
    """Return a micro-batch of mean parts (`list_parts`), as many as the budget and the rank's share of a step allow, or of the largest alone."""
    sizes = [size_part(*part, runtime.layout) for part in list_parts(config, runtime, work)]
    tokens, positions, _ = (sum(column) / len(sizes) for column in zip(*map(astuple, sizes), strict=True))
    stem, _ = share_stem(config, runtime, work, ranks=ranks)
    each = math.ceil(count_parts(config, runtime, work) / ranks)
    count = min(each, max(1.0, (runtime.microbatch_tokens - stem) / (tokens - stem)))
    filled = MicroBatchSize(round(stem + count * (tokens - stem)), round(count * positions))
    return max(filled, *sizes, key=lambda size: size.tokens)


def size_part(prompt: int, responses: Sequence[int], layout: Layout) -> MicroBatchSize:
    """Return the size of a prompt with some of its responses."""
    return MicroBatchSize(count_row(prompt, responses, layout), sum(responses))


def share_stem(config: TrainConfig, runtime: Runtime, work: Workload, *, ranks: int) -> tuple[int, float]:
    """Return (tokens that the prompts of a micro-batch share, how many parts it holds, on average): none in rows, nor where it is not worth it."""
    parts = list_parts(config, runtime, work)
    mean = sum(count_row(*part, runtime.layout) for part in parts) / len(parts)
    of_step = len(parts) / len(work.shapes) * work.rows / count_steps(work.rows, batch_prompts=config.batch_prompts)
    for stem in (work.stem if runtime.layout == Layout.tree else 0, 0):
        full = math.ceil(of_step / max(1, math.floor((runtime.microbatch_tokens - stem) / (mean - stem))))
        together = of_step / min(of_step, math.ceil(full / ranks) * ranks)
        if (together - 1) * stem >= WORTH * together * (mean - stem):
            break
    return stem, together


def count_parts(config: TrainConfig, runtime: Runtime, work: Workload) -> float:
    """Return how many parts a step can be cut into, on average."""
    return config.batch_prompts * len(list_parts(config, runtime, work)) / len(work.shapes)


def share_busy(parts: float, *, ranks: int) -> float:
    """Return the share of the ranks' time in which they have a part of a step: of 16 for 12 ranks two thirds, for 64 a quarter."""
    return parts / ranks / math.ceil(parts / ranks)


def list_parts(config: TrainConfig, runtime: Runtime, work: Workload) -> list[Shape]:
    """Return what training cuts rows into at most: all responses of a prompt where the objective compares them, in trees as many as the
    budget has room for with the prompt, which every part repeats, else one."""
    parts: list[Shape] = []
    for prompt, responses in work.shapes:
        if config.whole_groups:
            parts.append((prompt, responses))
        elif runtime.layout == Layout.rows:
            parts += [(prompt, (response,)) for response in responses]
        else:
            places = split_group(prompt, responses, budget=runtime.microbatch_tokens)
            parts += [(prompt, tuple(responses[place] for place in part)) for part in places]
    return parts


def estimate_rank(
    model: Any, config: TrainConfig, runtime: Runtime, work: Workload, machine: Machine, *, ranks: int
) -> Footprint:
    """Return the memory of each of so many ranks."""
    return estimate_footprint(
        model,
        precision=config.precision,
        ranks=ranks,
        replicas=machine.replicas,
        micro=size_microbatch(config, runtime, work, ranks=ranks),
        kind="cpu" if machine.name == "cpu" else "cuda",
        activation_checkpointing=runtime.activation_checkpointing,
    )


def find_ranks(footprint: Callable[..., Footprint], machine: Machine) -> int | None:
    """Return the first double, fourfold ... of a machine's ranks with room for their share; None where none up to MOST_RANKS has."""
    ranks = machine.ranks
    while footprint(ranks=ranks).total > machine.memory_bytes:
        ranks *= 2
        if ranks > MOST_RANKS:
            return None
    return ranks


def list_spans(prompt: int, responses: Sequence[int], layout: Layout) -> list[tuple[int, int]]:
    """Return (position of the first token, tokens) of what a row is read in."""
    if layout == Layout.rows:
        return [(0, prompt + response - 1) for response in responses]
    return [(0, prompt), *((prompt, response - 1) for response in responses)]


def require_room(plan: Plan) -> None:
    """Raise ValueError when a rank has no room for its share, naming what takes it and how many ranks would do."""
    if plan.fits:
        return
    parts = asdict(plan.footprint)
    most = ", ".join(f"{name} {show_bytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)
    advice = "set runtime.activation_checkpointing, lower runtime.microbatch_tokens, or take a device with more memory"
    if plan.ranks_with_room is not None:
        advice = f"raise --ranks to {plan.ranks_with_room}, {advice}"
    raise ValueError(
        f"memory: {plan.model_type} of {plan.parameters / 1e9:.3g} B parameters takes {show_bytes(plan.footprint.total)} on each of "
        f"{plan.machine.ranks} ranks ({most}), got {show_bytes(plan.machine.memory_bytes)} of {plan.machine.name}; expected at most that; {advice}"
    )
