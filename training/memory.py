"""The memory of a device: what training will take by a formula, what a piece of work took, what is free; and work that adapts."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.config import Precision
from training.logprobs import CHUNK_ELEMENTS

GIB = 2**30
FLOAT32 = 4  # bytes
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's malloc.h
# What ends a container before the machine's own memory does: (limit, use), of control groups 2 and 1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


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
    keys: int  # that the responses of trees see, and that are copied for them; 0 for rows
    positions: int  # that predict a trained token


@dataclass(frozen=True)
class Footprint:
    """Bytes that training holds on each rank."""

    weights: int
    gradients: int
    optimiser: int  # AdamW's two moments
    gathered: int  # the layer under way, whole, where weights are sharded over ranks
    activations: int  # what one micro-batch keeps for its backward pass
    logits: int  # of a chunk of positions, and the gradient of the output head, to which that of a chunk is added

    @property
    def total(self) -> int:
        """All of it at once: activations are at their most where the backward pass begins."""
        return (
            self.weights + self.gradients + self.optimiser + self.gathered + self.activations + self.logits
        )  # fmt: skip


def estimate_footprint(
    model: Any,
    *,
    precision: Precision,
    ranks: int,
    micro: MicroBatchSize,
    kind: str = "cpu",
    activation_checkpointing: bool = False,
) -> Footprint:
    """Return what training takes on each of `ranks` devices of a kind (cpu, cuda), weights, gradients and moments in float32 and sharded evenly.

    What is frozen, as all but the adapter is with LoRA, has neither gradients nor moments.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = -(-parameters // ranks)
    trained = -(-count_trained(model) // ranks)
    layers = model.config.num_hidden_layers
    matrix = model.get_output_embeddings().weight
    head = matrix.numel()
    wide = precision == Precision.float32
    cast = 0 if wide else 2 * share  # autocast keeps a bfloat16 copy of every matrix for the whole step
    chunk = min(CHUNK_ELEMENTS[kind], micro.positions * model.config.vocab_size)
    layer = estimate_layer(model.config, precision=precision, micro=micro)
    # Where layers are computed again: of each what enters it, and all of the one under way.
    kept = (
        layers * FLOAT32 * model.config.hidden_size * micro.tokens + layer
        if activation_checkpointing
        else layers * layer
    )
    return Footprint(
        weights=FLOAT32 * share + cast,
        gradients=FLOAT32 * trained,
        optimiser=2 * FLOAT32 * trained,
        gathered=0 if ranks == 1 else FLOAT32 * max(head, (parameters - head) // layers),
        activations=kept + 3 * FLOAT32 * model.config.hidden_size * micro.tokens,  # the norm behind the last layer
        logits=3 * FLOAT32 * chunk + (FLOAT32 if wide else FLOAT32 + 2) * head * matrix.requires_grad,
    )


def count_trained(model: Any) -> int:
    """Return how many of a model's parameters training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def estimate_layer(config: Any, *, precision: Precision, micro: MicroBatchSize) -> int:
    """Return the bytes that a layer of a dense decoder keeps of a micro-batch for its backward pass.

    With hidden size H, heads x head size A and MLP size I, in numbers a token: 6 H for two norms (input,
    normalised, scaled), 5 A for attention (query, key, value, output, output in the order of tokens; keys and values repeated for
    grouped queries), 4 I for a gated MLP. In trees each response has its own copy of the keys and values it sees: 2 A for each
    key. Under bfloat16 the norms stay in float32, with a bfloat16 copy of what goes into matrices; all else is halved.
    """
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 0)  # none where there is no attention (Mamba)
    attention = heads * (getattr(config, "head_dim", None) or hidden // max(heads, 1))
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    norms = 6 * hidden * FLOAT32 if precision == Precision.float32 else 2 * hidden * (2 * FLOAT32 + 2)
    width = FLOAT32 if precision == Precision.float32 else 2
    per_token = norms + width * (5 * attention + 4 * inner)
    kept: int = per_token * micro.tokens + width * 2 * attention * micro.keys
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
    for limit, use in CGROUPS:
        if Path(limit).exists() and (bound := Path(limit).read_text().strip()) != "max":
            free.append(int(bound) - int(Path(use).read_text()))
    if not free:  # no Linux
        import psutil

        return int(psutil.virtual_memory().available)
    return min(free)


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
