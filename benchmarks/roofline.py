"""Where a VAR step's time goes against what the machine allows: the roofline of Williams et al. (CACM 52 (2009) 65).

`python -m benchmarks.roofline [--data FOLDER] [--length TOKENS] [--score] [--figure FILE] [--json]`: SmolLM2-135M, eight pairs of HH-RLHF as
`benchmarks.training` has them, or one pair of TOKENS tokens; with `--score` the pass over them that scores a reference, in place of a step. Two roofs are measured: the rate of a large float32 matrix product, and that of
a += b over arrays far larger than any cache. One step is looked at as it is dispatched, which gives operations and bytes of every kernel (each
operand once: what a cache saves and what a kernel reads twice is not in it), and the same step again by torch.profiler, which gives its time.
The bound is the longer of the times that a kernel needs at either roof; of what comes from a cache it can be above the time itself.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine import gemm_rate, make_lanes, open_model, pick_pairs, score, take_steps
from benchmarks.figures import finish_figure, start_figure
from benchmarks.rows import find_rows
from benchmarks.training import DATA_HELP, SHARED
from infra.models import fetch_embedded
from infra.settings import read_settings
from training.checkpoint import Progress
from training.devices import name_device
from training.distributed import World
from training.flops import count_flops
from training.memory import keep_freed_memory
from training.model import prepare_model
from training.steps import Steps
from training.tree import enable_trees

STREAMED_NUMBERS = 2**26
WRITTEN_ONLY = {"zero_", "fill_", "copy_"}  # their first argument is not read
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
KINDS = {
    "SegmentAttention": "attention",  # as a profile has it, with all that its threads do
    "SegmentAttentionBackward": "attention, backward",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention, backward",
    "_fused_adamw_": "AdamW",
    "_foreach_norm": "norm of the gradients",
    "linalg_vector_norm": "norm of the gradients",
    "_foreach_mul_": "norm of the gradients",
}
LAYERS, HEAD, ELEMENTS, REST = (
    "matrices of the layers",
    "output head",
    "by elements, sums, copies",
    "views, dispatch, Python",
)


@dataclass
class Work:
    """What kernels of a kind had to do, and how long they took."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def bound(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the seconds that the roofs allow."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


class Traffic(TorchDispatchMode):
    """Adds up operations and bytes of every kernel by its kind."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.found: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode operations come whole that are made of others
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        if any(value.alias_info is not None and not value.alias_info.is_write for value in returns) or "empty" in name:
            return out  # a view, or nothing yet
        read = list(tensors(args))[1 if name in WRITTEN_ONLY else 0 :]
        shapes = [list(tensor.shape) for tensor in read]
        work = self.found[kind_of(name, shapes, self.vocabulary)]
        work.bytes += sum(map(size_of, read)) + sum(map(size_of, tensors(out)))
        if name == "_fused_adamw_":  # weights, gradients and both moments are read, all but the gradients written
            work.bytes += sum(size_of(tensor) for part in (args[0], args[2], args[3]) for tensor in part)
        if name in PRODUCTS:
            left, right = shapes[-2:]
            work.flops += 2 * torch.Size(left).numel() * right[-1]
        elif name not in KINDS:
            work.flops += max((tensor.numel() for tensor in tensors(out)), default=0)
        return out


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def size_of(tensor: Tensor) -> int:
    """Return the bytes behind a tensor, of one that is expanded those that are there."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def kind_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """Return what a kernel is for."""
    if name in PRODUCTS:
        return HEAD if any(vocabulary in shape for shape in shapes) else LAYERS
    return KINDS.get(name, ELEMENTS)


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=find_rows("hh-rlhf"), help=DATA_HELP)
    parser.add_argument("--length", type=int, help="tokens of one pair made for it, in place of eight of HH-RLHF")
    parser.add_argument("--score", action="store_true", help="the reference's pass over the pairs, in place of a step")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    if options.length is None and (options.data is None or not options.data.is_dir()):
        parser.error(f"--data: got {options.data}, expected the folder that holds HH-RLHF's helpful-base, or --length")
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as folder:
        rows = {"length": options.length, "batch_pairs": 1, "pairs": 1} if options.length else {}
        places = {"model": str(model), "data": str(options.data), "folder": folder}
        found = measure(SHARED | places | {"steps": 1} | rows, scores=options.score)
    if not options.json:
        print("\n".join(show(found)))
    if options.figure:
        draw(found, options.figure)
    print(json.dumps(found))


def measure(spec: dict[str, Any], *, scores: bool = False) -> dict[str, Any]:
    """Return both roofs, and operations, bytes and seconds by kind: of the one step timed, or of the pass that scores its pairs."""
    tokenizer, model = open_model(spec)
    world = World(torch.device("cpu"))
    model = prepare_model(model, tokenizer, Path(spec["model"])).eval()
    enable_trees(model)
    keep_freed_memory()
    pairs = [] if "length" in spec else pick_pairs(spec, tokenizer)
    (lane,) = make_lanes([spec], pairs, model, world)
    rates = take_steps([lane], spec)
    work, tokens = lane.trainer.work, lane.trainer.progress.tokens
    assert isinstance(work, Steps)
    samples = work.samples(1)
    # Of use are the pairs that see each other alone; two products of a forward pass have four behind them.
    attention = lane.describe(count_flops(model))["attention_flops"] / 3

    def run() -> None:
        if scores:
            score(model, work.rows(1), spec, world)
        else:
            lane.trainer.progress = Progress(step=1)
            lane.trainer.take_step()

    run()  # once more, as it will be looked at
    found = count_work(run, model)
    found["attention"].flops = attention
    if not scores:
        found["attention, backward"].flops = 2 * attention
    for kind, seconds in time_kernels(run, model).items():
        found[kind].seconds = seconds
    rates.append(gemm_rate())
    return {
        "device": name_device(world.device),
        "threads": torch.get_num_threads(),
        "responses": len(samples),
        "tokens": tokens,
        "positions": sum(sample.num_trained for sample in samples),
        "flops_per_second": float(np.median(rates)),
        "bytes_per_second": stream_rate(),
        "kinds": {
            kind: {"flops": work.flops, "bytes": work.bytes, "seconds": work.seconds} for kind, work in found.items()
        },
    }


def count_work(run: Callable[[], None], model: Any) -> dict[str, Work]:
    """Return operations and bytes of what is run by kind, attention's operations aside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is dispatched in other threads is not seen
    with Traffic(model.config.vocab_size) as traffic:
        run()
    torch.set_num_threads(threads)
    return traffic.found


def time_kernels(run: Callable[[], None], model: Any) -> dict[str, float]:
    """Return the seconds of what is run by kind, each kernel's own."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    dispatched = {name.removeprefix("aten::") for name in seen_kernels(profiler)}
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        name = event.key.removeprefix("aten::")
        shapes = [shape for shape in event.input_shapes if isinstance(shape, list)]
        kind = kind_of(name, shapes, model.config.vocab_size)
        spent[kind if name in dispatched else REST] += event.self_cpu_time_total / 1e6
    return spent


def seen_kernels(profiler: Any) -> set[str]:
    """Return the names of what computes or moves numbers."""
    views = {
        "as_strided",
        "transpose",
        "expand",
        "view",
        "reshape",
        "t",
        "slice",
        "narrow",
        "select",
        "unsqueeze",
        "squeeze",
    }
    names = {event.key for event in profiler.key_averages() if event.key.startswith("aten::") or event.key in KINDS}
    still = {f"aten::{name}" for name in views} | {name for name in names if "empty" in name}
    return names - still


def stream_rate(repeats: int = 5) -> float:
    """Return the bytes a second of a += b, the best of a few: two are read and one is written."""
    a, b = torch.zeros(STREAMED_NUMBERS), torch.ones(STREAMED_NUMBERS)
    best = float("inf")
    for _ in range(repeats):
        started = time.monotonic()
        a.add_(b)
        best = min(best, time.monotonic() - started)
    return 3 * a.numel() * a.element_size() / best


def show(found: dict[str, Any]) -> list[str]:
    """Return the table in Markdown, the longest kind first."""
    roofs = {name: found[name] for name in ("flops_per_second", "bytes_per_second")}
    total = sum(kind["seconds"] for kind in found["kinds"].values())
    lines = [
        f"{found['device']}, {found['threads']} threads: {roofs['flops_per_second'] / 1e9:.0f} GFLOP/s, {roofs['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"so {roofs['flops_per_second'] / roofs['bytes_per_second']:.0f} FLOP a byte where they meet; all {total:.2f} s",
        "",
        "| what | share | GFLOP | GB | FLOP a byte | GFLOP/s | bound, share of all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kind in sorted(found["kinds"].items(), key=lambda item: -item[1]["seconds"]):
        work = Work(**kind)
        told = f"| {name} | {work.seconds / total:.1%} |"
        if work.bytes:
            bound = work.bound(**roofs) / total
            told += f" {work.flops / 1e9:.1f} | {work.bytes / 1e9:.2f} | {work.flops / work.bytes:.3g} | {work.flops / work.seconds / 1e9:.1f} | {bound:.1%} |"
        else:
            told += " | | | | |"
        lines.append(told)
    bounds = sum(Work(**kind).bound(**roofs) for kind in found["kinds"].values())
    return [*lines, "", f"All bounds together: {bounds / total:.1%} of it."]


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the roofs and every kind's place under them."""
    rate, stream = found["flops_per_second"] / 1e9, found["bytes_per_second"] / 1e9
    figure, axes = start_figure()
    intensity = [0.01, rate / stream, 1000.0]
    axes.plot(intensity, [min(rate, stream * x) for x in intensity], color="black", label="the machine's roofs")
    for name, kind in found["kinds"].items():
        if kind["bytes"] and kind["flops"] and kind["seconds"]:
            x, y = kind["flops"] / kind["bytes"], kind["flops"] / kind["seconds"] / 1e9
            axes.scatter([x], [y], s=50, zorder=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (FLOP/B)", ylabel="GFLOP/s")
    finish_figure(figure, axes, path)


if __name__ == "__main__":
    main()
