"""The memory of a device: what training will take by a formula, what a piece of work took, what is free; and work that adapts."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from training.config import Precision
from training.head import CHUNK_ELEMENTS
from training.model import find_layers

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2  # bytes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's malloc.h
# What ends a container before the machine's own memory does: folder, limit, use, and what the lines of memory.stat begin with that count files which
# the kernel keeps in it, read once or more often, and lets go first; of control groups 2 and 1.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
MEMBERSHIP = Path("/proc/self/cgroup")  # lines of number:controllers:path


def keep_freed_memory() -> None:
    """Let this process keep what it frees: the tensors of the next micro-batch have the sizes of the last one's, and what went back
    to the kernel comes again page by page, each cleared first. Does nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks from the heap too
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def run_in_halves(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """Return work(items), or, when the device has no room for so many at once, the results of both halves in order.

    `work` must not care what else is in its batch. One item that does not fit alone is the device's limit, and raised.
    """
    try:
        return work(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
        torch.cuda.empty_cache()
    half = len(items) // 2  # outside the handler, which would keep the failed batch's tensors alive
    return run_in_halves(work, items[:half]) + run_in_halves(work, items[half:])


@dataclass(frozen=True)
class MicroBatchSize:
    """What of a micro-batch takes memory, in tokens."""

    tokens: int  # through the model
    positions: int  # that predict a trained token
    scores: int = 0  # of a head's attention that are kept, as where some are dropped: no fused kernel does so on a CPU


@dataclass(frozen=True)
class Footprint:
    """Bytes that training holds on each rank; `estimate_footprint` has the formulas."""

    weights: int
    copies: int  # of weights, as autocast makes them for a step
    gradients: int
    optimiser: int  # AdamW's two moments
    gathered: int  # weights and gradients of several ranks while they are whole
    activations: int  # what one micro-batch keeps for its backward pass
    logits: int  # of a chunk of positions, and the gradient of the output head, to which that of a chunk is added

    @property
    def total(self) -> int:
        """All of it at once: activations are at their most where the backward pass begins."""
        return (
            self.weights + self.copies + self.gradients + self.optimiser + self.gathered + self.activations + self.logits
        )  # fmt: skip

    @property
    def step(self) -> int:
        """What comes to the weights with a forward and backward pass; the optimiser's state comes behind it."""
        return self.total - self.weights - self.optimiser


def estimate_footprint(
    model: Any,
    *,
    precision: Precision,
    ranks: int,
    replicas: int = 1,
    micro: MicroBatchSize,
    kind: str = "cpu",
    activation_checkpointing: bool = False,
) -> Footprint:
    """Return what training takes on each of `ranks` devices of a kind (cpu, cuda), which hold `replicas` whole models together.

    Weights, gradients and moments are float32. With N the numbers that a rank holds of the model (`count_slices` over the ranks of a
    replica), N' those that are trained (the adapter's with LoRA), w the bytes of a number in matrix products (4, in bfloat16 2), L those of the
    largest layer, A those around the layers (embedding, last norm, output head), V H the head's, of micro-batch and device C the logits of a chunk:

    - weights: 4 N. copies, on one rank in bfloat16: 2 for each number of layers and head, from autocast, which keeps them for the step.
    - gradients: 4 N'. optimiser: 8 N'.
    - gathered, of several ranks: 4 A + 2 w L + (w + 4) L'. FSDP2 gathers what is around the layers as one part, here in float32, and
      keeps it from the forward pass to the end of the backward one; a layer it lets go of, while the next one is on its way. Gradients of a
      layer are whole until they are copied, in float32, into what is sent. What is around is there twice where it is gathered, and its
      gradients are whole at the end: activations and logits are not there then. The head's gradient is counted with its logits.
    - activations: `estimate_layer` for each layer and 3 H for the last norm; with checkpointing H for each layer, and one layer.
    - logits: 12 C, and for the head's gradient 4 V H, in bfloat16 2 V H more for that of a chunk; of several ranks in bfloat16 also
      2 V H for the head as it is multiplied, which is gathered in float32.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    layers = find_layers(model)
    in_layers = sum(count(layer.parameters()) for layer in layers)
    largest = max(layers, key=lambda layer: count(layer.parameters()), default=None)
    of_layer = list(largest.parameters()) if largest is not None else []
    outputs = model.get_output_embeddings()  # a reward model has none
    head, learns = (outputs.weight.numel(), outputs.weight.requires_grad) if outputs is not None else (0, False)
    shards, wide = ranks // replicas, precision == Precision.float32
    width = FLOAT32 if wide else BFLOAT16
    copies = 0 if wide or ranks > 1 else BFLOAT16 * (in_layers + head)
    gathered = (
        FLOAT32 * (count(parameters) - in_layers)
        + 2 * width * count(of_layer)
        + (width + FLOAT32) * count(p for p in of_layer if p.requires_grad)
    )
    kept = estimate_kept(
        model.config, precision=precision, micro=micro, kind=kind, activation_checkpointing=activation_checkpointing
    )
    head_gradient = (FLOAT32 if wide else FLOAT32 + BFLOAT16) * head * learns
    head_cast = 0 if wide or ranks == 1 else BFLOAT16 * head
    return Footprint(
        weights=FLOAT32 * count_slices(parameters, shards),
        copies=copies,
        gradients=FLOAT32 * count_slices(trained, shards),
        optimiser=2 * FLOAT32 * count_slices(trained, shards),
        gathered=gathered if ranks > 1 else 0,
        activations=kept.activations,
        logits=kept.logits + head_gradient + head_cast,
    )


def count(parameters: Iterable[Tensor]) -> int:
    """Return how many numbers parameters have."""
    return sum(parameter.numel() for parameter in parameters)


def count_slices(parameters: Iterable[Tensor], ranks: int) -> int:
    """Return how many numbers each of `ranks` holds of parameters as FSDP2 shards them: rows of the first dimension, equally many on
    every rank, the last ones' padded."""
    if ranks == 1:
        return count(parameters)
    return sum(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in parameters)


def count_trained(model: Any) -> int:
    """Return how many of a model's parameters training changes."""
    return count(parameter for parameter in model.parameters() if parameter.requires_grad)


class Kept(NamedTuple):
    """Bytes of a micro-batch: what is kept of it for its backward pass, and of a chunk of its positions the logits."""

    activations: int
    logits: int


def estimate_kept(
    config: Any, *, precision: Precision, micro: MicroBatchSize, kind: str, activation_checkpointing: bool
) -> Kept:
    """Return what of a model's memory depends on its micro-batch, by the formulas of `estimate_footprint`."""
    entry = FLOAT32 * config.hidden_size * micro.tokens
    layer, depth = estimate_layer(config, precision=precision, micro=micro), config.num_hidden_layers
    activations = (depth * entry + layer if activation_checkpointing else depth * layer) + 3 * entry
    return Kept(activations, 3 * FLOAT32 * min(CHUNK_ELEMENTS[kind], micro.positions * config.vocab_size))


def estimate_layer(config: Any, *, precision: Precision, micro: MicroBatchSize) -> int:
    """Return the bytes that a layer of a dense decoder keeps of a micro-batch for its backward pass.

    With hidden size H, heads x head size A, B of keys, and MLP size I, in numbers a token: 6 H for two norms (input, normalised, scaled),
    3 A + 2 B for attention (query, output, output in the order of tokens; key and value, of which transformers makes 2 A where there is a mask,
    as for a reward model's padding), 4 I for a gated MLP. Scores that are kept are so three times for each head: their softmax, what is dropped, and the rest. Under bfloat16 the norms stay in float32, with a bfloat16 copy of what goes into matrices; all else is halved.
    """
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 0)  # none where there is no attention (Mamba)
    size = getattr(config, "head_dim", None) or hidden // max(heads, 1)
    attention, keys = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    norms = 6 * hidden * FLOAT32 if precision == Precision.float32 else 2 * hidden * (2 * FLOAT32 + 2)
    width = FLOAT32 if precision == Precision.float32 else 2
    per_token = norms + width * (3 * attention + 2 * keys + 4 * inner)
    kept: int = per_token * micro.tokens + width * 3 * heads * micro.scores
    return kept


def show_bytes(count: float) -> str:
    """Return bytes as a person reads them: in GiB, small ones in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def measure_free(device: torch.device) -> int:
    """Return the bytes that this process can still take: on the GPU, or of the machine's and the container's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = [1024 * read_kib("/proc/meminfo", "MemAvailable")] if Path("/proc/meminfo").exists() else []
    for folder, limit, use, prefix in list_cgroups():
        if (folder / limit).exists() and (bound := (folder / limit).read_text().strip()) != "max":
            stat = folder / "memory.stat"  # not every sandbox has one
            counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            free.append(int(bound) - int((folder / use).read_text()) + cached)
    if not free:  # no Linux
        return int(psutil.virtual_memory().available)
    return min(free)


def list_cgroups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the groups of CGROUPS and, below each, those that this process is in: a job of Slurm's or systemd's has its limit in one."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    own = {Path(line.split(":", 2)[2]) for line in lines}
    for root, limit, use, cached in CGROUPS:
        groups = {root} | {root / path.relative_to("/") for member in own for path in (member, *member.parents)}
        yield from ((folder, limit, use, cached) for folder in groups)


def read_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds now, and the most that it has held: on the GPU tensors, since the last call; else resident
    pages, since it began."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return held
    return psutil.Process().memory_info().rss, read_resident_peak()


@dataclass
class Peak:
    """Bytes by which memory rose at most while some work ran; set at its end."""

    bytes: int = 0


@contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Measure by how much the memory in use rises, on the GPU or in this process (resident pages), while the block runs."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = reset_resident_peak()
    yield peak
    peak.bytes = max(0, read_resident_peak() - before)


def reset_resident_peak() -> int:
    """Let the kernel's mark of this process's largest memory begin anew, where it can, and return where it stands."""
    with suppress(OSError):  # no Linux, or not allowed: the mark stays where earlier work put it
        Path("/proc/self/clear_refs").write_text("5")
    return read_resident_peak()


def read_resident_peak() -> int:
    """Return the largest resident memory of this process, in bytes."""
    if Path("/proc/self/status").exists():
        return 1024 * read_kib("/proc/self/status", "VmHWM")
    import resource  # macOS counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_kib(path: str, name: str) -> int:
    """Return a line's number of one of the kernel's files of `Name:   123 kB` lines."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
