"""What the reward comparisons are made of: VAR against TRL's GRPO by time, against TRL's DPO by gain at equal time.

HH-RLHF's helpful-base is cut by prompt into three: `own` (the policies' rows, and the reward model that weighs VAR's), `judge` (a second
reward model, another seed) and `heldout` (prompts that no model trains on). Both reward models are MiniLM, trained by this project; the
scorers are given, as the paper's is: their own training is in nobody's time, and is printed.

**GRPO**: both methods train on the same prompts against the first reward model, and are looked at on the same held-out prompts, by the same
sampled noise, when their own time passes the next of FIRST_LOOK_SECONDS * LOOK_RATIO^n; looking is in nobody's time, VAR's sampling and
scoring is in its own. The target is set before anything trains: base + `target_gain` standard deviations of the reward within a prompt.
Both methods have the same three learning rates and count by their best; GRPO's are tried for PILOT_SHARE of CENSORED_AT times VAR's time, then the best
has the whole of it from the start. So has GRPO as a user gets it, at TRL's own learning rate, with TRL's own micro-batch and its activations computed
again; the others keep them, and have the micro-batch whose forward and backward passes of one step are fastest. A reward model and no rule-made reward, since such
a one (length, say) moves with one token's probability.

**DPO**: both have the same seconds; DPO the pairs, VAR the base's own samples for their first prompts, drawn and weighed in its time: as many samples, of many
prompts or many of each. DPO's micro-batch is the faster of two, tried before. Six trials each, on held-out prompts of their own, then three other seeds of the best, answered greedily and scored by the second reward
model. The interval of the ratio is Fieller's, with the covariances of a bootstrap over prompts and seeds; where DPO's gain is not
significant, there is no ratio. `reward_gain_targets_var` says what VAR had to learn: what the second reward model gives its samples, the
same by their weights, and the best of each prompt. On the pairs themselves VAR learns to answer as they do: SmolLM2's own answers are better (benchmarks/README.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.training import Bench

CENSORED_AT = 10.0  # times VAR's time: a GRPO that has not arrived by then is not waited for
DEFAULT_GRPO_RATE, DEFAULT_MICROBATCH = 1e-6, 8  # TRL's, of responses
PILOT_SHARE = 0.2  # of that, for each of GRPO's learning rates
BATCH_RESPONSES = 32  # a step, of VAR against DPO, which has eight pairs
CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Sizes:
    """How much work the comparisons are."""

    source_rows: int | None = None  # of the source; None: all
    reward_epochs: int = 2
    longest_pair: int = 192  # tokens of prompt and longest response, of the rows that policies read
    longest_prompt: int = 144  # tokens, of those held out
    heldout_prompts: int = 96  # of the first comparison; the second has tuning_prompts and then final_prompts
    new_tokens: int = 32
    prompts: int = 16  # sampled from
    responses: int = 8  # a prompt, of VAR and of GRPO
    batch_prompts: int = 4  # a step, likewise
    grpo_microbatches: Sequence[int] = (8, 16, 32)  # responses
    target_gain: float = 0.5  # standard deviations of the reward within a prompt: several standard errors of a look
    var_epochs: int = 4  # at most, over the same samples
    pairs: int = 256  # DPO's
    gain_samples: int = 384  # VAR's, of these pairs' prompts
    gain_lambda: float = 0.25  # standard deviations of the reward within a prompt
    dpo_microbatches: Sequence[int] = (1, 2)  # pairs
    sweep_seconds: float = 60.0  # for each of these
    target_prompts: int = 96  # where only the target is looked at
    target_responses: Sequence[int] = (2, 4, 8, 16)  # of each
    target_lambdas: Sequence[float] = (0.25, 0.5)
    gain_seconds: float = 270.0
    tuning_prompts: int = 96
    final_prompts: int = 272
    answer_tokens: int = 48
    seeds: int = 3
    rates: Sequence[float] = (1e-4, 3e-5, 3e-4)  # of both
    var_lambda: float = 0.5  # standard deviations of the reward within a prompt
    # Learning rate, and beta or responses a prompt: four trials of the same rates, then two where each was best.
    dpo_trials: Sequence[tuple[float, float]] = (
        (1e-4, 0.05), (1e-4, 0.1), (2e-4, 0.05), (2e-4, 0.1), (1e-4, 0.025), (5e-5, 0.05),
    )  # fmt: skip
    var_trials: Sequence[tuple[float, int]] = ((1e-4, 4), (1e-4, 8), (2e-4, 4), (2e-4, 8), (2e-4, 16), (4e-4, 16))


def compare_with_grpo(bench: "Bench") -> dict[str, Any]:
    """Time to a held-out reward: TRL's GRPO over VAR. Null where VAR does not reach it, a lower bound where GRPO does not."""
    sizes, rows = bench.sizes, measure_rows(bench)
    reward = bench.measure("reward_model", rows=rows["own"], epochs=sizes.reward_epochs, seed=0)
    heldout = {"rows": rows["heldout"], "begin": 0, "end": sizes.heldout_prompts, "scorer": reward["folder"]}
    heldout |= {"temperature": 1.0, "new_tokens": sizes.new_tokens}
    trained = {"rows": rows["pairs"], "prompts": sizes.prompts, "responses": sizes.responses}
    trained |= {"new_tokens": sizes.new_tokens, "batch_prompts": sizes.batch_prompts, "heldout": heldout}
    trained |= {"longest_pair": sizes.longest_pair}
    samples = bench.measure("samples", seed=0, scorer=reward["folder"], **trained)
    base = float(np.mean(bench.measure("base", heldout=heldout)["rewards"]))
    target = base + sizes.target_gain * samples["within_prompt_std"]
    told = {
        "grpo_reward_base": base,
        "grpo_reward_target": target,
        "grpo_reward_std_within_prompt": samples["within_prompt_std"],
        "grpo_reward_model_accuracy": reward["accuracy"],
        "grpo_reward_model_seconds": reward["seconds"],
        "grpo_var_sampling_seconds": samples["seconds"],
    }
    common = trained | {"target": target}
    ours = {
        rate: bench.measure("var_curve", learning_rate=rate, lambda_=sizes.var_lambda, epochs=sizes.var_epochs, samples=samples, **common)
        for rate in sizes.rates
    }  # fmt: skip
    told["grpo_var_curves"] = {rate: found["curve"] for rate, found in ours.items()}
    told["grpo_var_phases"] = {rate: found["phases"] for rate, found in ours.items()}
    told["grpo_var_steps"] = {rate: found["steps"] for rate, found in ours.items()}
    arrived = [found["seconds"] for found in ours.values() if found["arrived"]]
    if not arrived:
        return told | {"var_vs_grpo_time_to_reward": None, "var_vs_grpo_time_to_reward_reason": "VAR did not arrive"}
    return told | race_grpo(bench, var_seconds=min(arrived), common=common)


def race_grpo(bench: "Bench", *, var_seconds: float, common: dict[str, Any]) -> dict[str, Any]:
    """Find GRPO's micro-batch, give its learning rates their pilots and the best of them the whole time, and return the ratio."""
    rates, limit = bench.sizes.rates, CENSORED_AT * var_seconds

    def run(rate: float, *, microbatch: int, seconds: float, tuned: bool = True) -> dict[str, Any]:
        return bench.measure("grpo", learning_rate=rate, microbatch=microbatch, tuned=tuned, limit=round(seconds, 3), **common)  # fmt: skip

    responses = common["batch_prompts"] * common["responses"]
    sweep = {}
    for n in (n for n in bench.sizes.grpo_microbatches if responses % n == 0):
        phases = run(rates[0], microbatch=n, seconds=0.001)["phases"]  # of one step
        sweep[n] = phases["forward"] + phases["rest"]  # what a micro-batch makes a difference to
    microbatch = min(sweep, key=lambda n: sweep[n])
    best, pilots = limit * (PILOT_SHARE if len(rates) > 1 else 1), {}
    for rate in rates:
        pilots[rate] = run(rate, microbatch=microbatch, seconds=best)
        if pilots[rate]["arrived"]:
            best = min(best, pilots[rate]["seconds"])
    arrived = [rate for rate, found in pilots.items() if found["arrived"]]
    if arrived:
        chosen = min(arrived, key=lambda rate: pilots[rate]["seconds"])
        theirs = pilots[chosen]
    else:
        chosen = max(pilots, key=lambda rate: pilots[rate]["curve"][-1][1])
        theirs = run(chosen, microbatch=microbatch, seconds=limit)
    default = run(DEFAULT_GRPO_RATE, microbatch=min(DEFAULT_MICROBATCH, responses), seconds=limit, tuned=False)
    return {
        "var_vs_grpo_time_to_reward": theirs["seconds"] / var_seconds,
        "var_vs_grpo_time_to_reward_censored": not theirs["arrived"],
        "var_vs_grpo_default_time_to_reward": default["seconds"] / var_seconds,
        "var_vs_grpo_default_time_to_reward_censored": not default["arrived"],
        "grpo_default_curve": default["curve"],
        "grpo_default_phases": default["phases"],
        "grpo_default_steps": default["steps"],
        "grpo_var_seconds": var_seconds,
        "grpo_seconds": theirs["seconds"],
        "grpo_steps": theirs["steps"],
        "grpo_phases": theirs["phases"],
        "grpo_microbatch": microbatch,
        "grpo_sweep_seconds": sweep,
        "grpo_learning_rate": chosen,
        "grpo_curve": theirs["curve"],
        "grpo_pilots": {rate: {name: found[name] for name in ("curve", "steps", "phases")} for rate, found in pilots.items()},
    }  # fmt: skip


def compare_reward_gain(bench: "Bench") -> dict[str, Any]:
    """Gain of reward over the base at equal wall-clock: VAR's over TRL DPO's, on a scorer that neither has seen."""
    sizes, rows = bench.sizes, measure_rows(bench)
    weigher = bench.measure("reward_model", rows=rows["own"], epochs=sizes.reward_epochs, seed=0)
    judge = bench.measure("reward_model", rows=rows["judge"], epochs=sizes.reward_epochs, seed=1)
    asked = {"rows": rows["heldout"], "scorer": judge["folder"], "temperature": 0.0, "new_tokens": sizes.answer_tokens}
    tuning = asked | {"begin": 0, "end": sizes.tuning_prompts}
    final = asked | {"begin": sizes.tuning_prompts, "end": sizes.tuning_prompts + sizes.final_prompts}
    common = {"rows": rows["pairs"], "longest_pair": sizes.longest_pair}
    microbatch, sweep = sweep_dpo(bench, common | {"heldout": asked | {"begin": 0, "end": 1}})

    def run_dpo(trial: Any, heldout: dict[str, Any], seed: int) -> dict[str, Any]:
        rate, beta = trial
        return bench.measure("dpo_gain", learning_rate=rate, beta=beta, microbatch=microbatch, heldout=heldout, seed=seed, limit=sizes.gain_seconds, **common)  # fmt: skip

    def draw(count: int, seed: int) -> dict[str, Any]:
        return bench.measure("samples", scorer=weigher["folder"], seed=seed, prompts=sizes.gain_samples // count, responses=count, new_tokens=sizes.answer_tokens, **common)  # fmt: skip

    def run_var(trial: Any, heldout: dict[str, Any], seed: int) -> dict[str, Any]:
        rate, count = trial
        trained = common | {
            "samples": draw(count, seed),
            "new_tokens": sizes.answer_tokens,
            "batch_prompts": BATCH_RESPONSES // count,
        }
        return bench.measure("var_gain", learning_rate=rate, lambda_=sizes.gain_lambda, heldout=heldout, seed=seed, limit=sizes.gain_seconds, **trained)  # fmt: skip

    tried = {
        name: {tuple(trial): float(np.mean(run(trial, tuning, 0)["rewards"])) for trial in trials}
        for name, run, trials in (("dpo", run_dpo, sizes.dpo_trials), ("var", run_var, sizes.var_trials))
    }
    best = {name: max(found, key=lambda trial: found[trial]) for name, found in tried.items()}
    seeds = range(1, sizes.seeds + 1)
    dpo, var = ([run(best[name], final, seed) for seed in seeds] for name, run in (("dpo", run_dpo), ("var", run_var)))
    base_P = np.array(bench.measure("base", heldout=final)["rewards"])
    targets = [bench.measure("target", samples=draw(best["var"][1], seed), scorer=judge["folder"], lambda_=sizes.gain_lambda) for seed in seeds]  # fmt: skip
    var_SP, dpo_SP = (np.array([found["rewards"] for found in runs]) - base_P for runs in (var, dpo))
    return compare_gains(var_SP, dpo_SP) | {
        "reward_gain_base": float(base_P.mean()),
        "reward_gain_base_tuning": float(np.mean(bench.measure("base", heldout=tuning)["rewards"])),
        "reward_gain_trials": {name: {f"{a:g}, {b:g}": mean for (a, b), mean in found.items()} for name, found in tried.items()},
        "reward_gain_best": best,
        "reward_gain_dpo_microbatch": microbatch,
        "reward_gain_dpo_sweep_seconds_per_pair": sweep,
        "reward_gain_pairs_dpo": [found["pairs"] for found in dpo],
        "reward_gain_prompts_var": [found["prompts"] for found in var],
        "reward_gain_targets_var": [{name: found[name] for name in ("samples", "weighted", "best")} for found in targets],
        "reward_gain_seconds": {"dpo": [found["seconds"] for found in dpo], "var": [found["seconds"] for found in var]},
        "reward_model_accuracy": {"weigher": weigher["accuracy"], "judge": judge["accuracy"]},
        "reward_model_seconds": {"weigher": weigher["seconds"], "judge": judge["seconds"]},
    }  # fmt: skip


def sweep_dpo(bench: "Bench", trained: dict[str, Any]) -> tuple[int, dict[int, float]]:
    """Return the micro-batch with which DPO is fastest on the longest of these pairs, which come first, and the seconds a pair of each."""
    sizes, (rate, beta) = bench.sizes, bench.sizes.dpo_trials[0]
    found = {}
    for microbatch in sizes.dpo_microbatches:
        run = bench.measure("dpo_gain", learning_rate=rate, beta=beta, microbatch=microbatch, seed=0, limit=sizes.sweep_seconds, **trained)  # fmt: skip
        found[microbatch] = run["seconds"] / run["pairs"]
    return min(found, key=lambda microbatch: found[microbatch]), found


def compare_targets(bench: "Bench") -> dict[str, Any]:
    """What VAR has to learn from, by how many responses a prompt has: the second reward model's mean of a target's samples over that of the
    base's, and the seconds that drawing and scoring take."""
    sizes, rows = bench.sizes, measure_rows(bench)
    weigher = bench.measure("reward_model", rows=rows["own"], epochs=sizes.reward_epochs, seed=0)
    judge = bench.measure("reward_model", rows=rows["judge"], epochs=sizes.reward_epochs, seed=1)
    drawn = {
        "rows": rows["pairs"],
        "longest_pair": sizes.longest_pair,
        "prompts": sizes.target_prompts,
        "new_tokens": sizes.answer_tokens,
    }
    samples = bench.measure("samples", scorer=weigher["folder"], seed=0, responses=max(sizes.target_responses), **drawn)
    told = {}
    for count in sizes.target_responses:
        asked = {"samples": samples, "scorer": judge["folder"], "responses": count}
        targets = {lambda_: bench.measure("target", lambda_=lambda_, **asked) for lambda_ in sizes.target_lambdas}
        (base,) = {found["samples"] for found in targets.values()}
        told[count] = {
            "seconds": samples["seconds"] * count / max(sizes.target_responses),
            "gain_by_lambda": {lambda_: found["weighted"] - base for lambda_, found in targets.items()},
            "gain_of_the_best": targets[sizes.target_lambdas[0]]["best"] - base,
        }
    return {"reward_targets_by_responses": told}


def measure_rows(bench: "Bench") -> dict[str, Any]:
    """Return the folders of the three parts."""
    sizes = bench.sizes
    wanted = max(sizes.pairs, sizes.prompts)
    return bench.measure("rows", source_rows=sizes.source_rows, longest_pair=sizes.longest_pair, longest_prompt=sizes.longest_prompt, pairs=wanted)  # fmt: skip


def compare_gains(var_SP: np.ndarray, dpo_SP: np.ndarray) -> dict[str, Any]:
    """Return both mean gains and their ratio with its interval, from the gains of S seeds on P prompts; no ratio for an insignificant
    gain of DPO's.

    Seeds are drawn for each method, prompts for both at once. Fieller's interval (J. R. Stat. Soc. B 16 (1954) 175) holds every ratio at which
    VAR's gain minus that much of DPO's does not differ from 0; it is finite exactly where DPO's gain does.
    """
    draw = np.random.default_rng(0)
    S, P = dpo_SP.shape
    drawn = np.empty((RESAMPLES, 2))
    for n in range(RESAMPLES):
        place_P = draw.integers(P, size=P)
        drawn[n] = [gain_SP[draw.integers(S, size=S)][:, place_P].mean() for gain_SP in (var_SP, dpo_SP)]
    (vv, vd), (_, dd) = np.cov(drawn.T)
    v, d, z = float(var_SP.mean()), float(dpo_SP.mean()), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    told = {"reward_gain_var": v, "reward_gain_var_se": float(vv**0.5), "reward_gain_dpo": d, "reward_gain_dpo_se": float(dd**0.5)}  # fmt: skip
    a, b, c = d**2 - z**2 * dd, v * d - z**2 * vd, v**2 - z**2 * vv
    if d <= 0 or a <= 0:
        reason = f"DPO's gain of {d:.4f} (standard error {dd**0.5:.4f}) does not exceed 0 significantly"
        return told | {"var_vs_dpo_reward_gain": None, "var_vs_dpo_reward_gain_ci": None, "var_vs_dpo_reward_gain_reason": reason}  # fmt: skip
    half = max(0.0, float(b**2 - a * c)) ** 0.5
    return told | {"var_vs_dpo_reward_gain": v / d, "var_vs_dpo_reward_gain_ci": [(b - half) / a, (b + half) / a]}
