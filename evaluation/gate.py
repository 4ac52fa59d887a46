"""The gate: from paired results to PROMOTE, HOLD or REJECT with reasons. Pure; docs/gate.md gives tests and formulas.

All guards must pass, so none is corrected for being one of several; one target is named beforehand, so neither is it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from evaluation import statistics
from evaluation.config import GatePolicy
from evaluation.result import BenchmarkResult, pair_items
from evaluation.result import read_result as read_result  # callers read what they decide on
from evaluation.verdict import Decision, GuardState, GuardVerdict, TargetVerdict, Verdict
from training.job import write_json

BOOTSTRAP_SEED = 20_241_105  # fixed, so that equal inputs give the equal verdict
FEW_ITEMS = 50  # by enumeration, the score test's error rate at alpha 0.05 is 0.06 at most from here up (docs/gate.md)
TANGO = "Tango score interval"
Scores = NDArray[np.float64]


def decide(
    policy: GatePolicy,
    *,
    challenger: list[BenchmarkResult],
    champion: list[BenchmarkResult],
    rewards_challenger: Mapping[str, float],
    rewards_champion: Mapping[str, float],
    same_model: bool,
    prompts: Mapping[str, str] | None = None,
) -> Verdict:
    """Return the verdict on two models' results over the same items and the same held-out prompts.

    Rewards are keyed by row id. `prompts` names the prompt of each row where several rows may share one; their rewards are
    averaged first, since answers to one prompt are not independent. ValueError for results that cannot be compared.
    """
    check_margins(policy)
    pairs = _pair_benchmarks(challenger, champion)
    absent = sorted(policy.margins.keys() - pairs.keys())
    if absent:
        raise ValueError(
            f"gate: no result of the guarded {', '.join(absent)}; got {sorted(pairs) or 'none'}; run it first"
        )
    guards = tuple(
        compare_guard(name, *pairs[name], margin=margin, alpha=policy.alpha) for name, margin in policy.margins.items()
    )
    gains, levels = _pair_rewards(rewards_challenger, rewards_champion, prompts=prompts)
    target = compare_target(policy.target, gains, levels=levels, alpha=policy.alpha, min_gain=policy.min_target_gain)
    decision, reasons = conclude(guards, target=target, same_model=same_model)
    flags = [
        *(flag for guard in guards for flag in flag_guard(guard)),
        *flag_target(target),
        *([] if guards else ["no benchmark is guarded: nothing stops a challenger that forgot everything else"]),
        *(f"{name} was measured and is not guarded" for name in sorted(pairs.keys() - policy.margins.keys())),
        *_flag_limits(challenger),
    ]
    return Verdict(
        decision=decision,
        reasons=reasons,
        flags=tuple(flags),
        guards=guards,
        target=target,
        same_model=same_model,
        alpha=policy.alpha,
    )


def check_margins(policy: GatePolicy) -> None:
    """Refuse margins that mean nothing."""
    bad = {name: margin for name, margin in policy.margins.items() if not 0 < margin < 1}
    if bad:
        raise ValueError(f"gate: a margin is a loss in score, above 0 and below 1; got {bad}; 0.02 means two points")


def compare_guard(
    benchmark: str, challenger_N: Scores, champion_N: Scores, *, margin: float, alpha: float
) -> GuardVerdict:
    """Test non-inferiority of paired item scores (n,): Tango's score test where each is 0 or 1, else a paired t test."""
    difference_N = challenger_N - champion_N
    n, won, lost = len(difference_N), int((difference_N > 0).sum()), int((difference_N < 0).sum())
    if np.isin(challenger_N, (0, 1)).all() and np.isin(champion_N, (0, 1)).all():
        tested = _test_binary(won, lost, n=n, margin=margin, alpha=alpha)
    else:
        tested = _test_continuous(difference_N, margin=margin, alpha=alpha)
    statistic, critical = tested.pop("statistic"), tested.pop("critical")
    state = GuardState.undecided
    if abs(statistic) >= critical:
        state = GuardState.non_inferior if statistic > 0 else GuardState.inferior
    more = statistics.items_to_decide(statistic, n=n, alpha=alpha) if state is GuardState.undecided else None
    guard = GuardVerdict(
        benchmark=benchmark,
        state=state,
        n=n,
        champion=float(champion_N.mean()),
        challenger=float(challenger_N.mean()),
        difference=float(difference_N.mean()),
        confidence=1 - 2 * alpha,
        margin=margin,
        won=won,
        lost=lost,
        discordance=(won + lost) / n,
        items_to_decide=more,
        reason="",
        **tested,
    )
    return guard.model_copy(update={"reason": _explain_guard(guard)})


def compare_target(
    name: str, gain_N: Scores, *, levels: tuple[float, float], alpha: float, min_gain: float
) -> TargetVerdict:
    """Test whether the mean gain over prompts (n,) exceeds `min_gain`; `levels` are both means, challenger first."""
    if len(gain_N) < 2:
        raise ValueError(f"gate: {name} needs at least 2 held-out prompts to have an interval; got {len(gain_N)}")
    test = statistics.paired_t(gain_N, alpha=alpha, minimum=min_gain)
    confidence = 1 - 2 * alpha
    low, high = statistics.bootstrap_interval(gain_N, np.arange(test.n), confidence=confidence, seed=BOOTSTRAP_SEED)
    superior = bool(test.sd > 0 and test.low > min_gain)
    statistic = (test.mean - min_gain) * np.sqrt(test.n) / test.sd if test.sd > 0 else 0.0
    # A loss is not shown to be a gain by any number of prompts.
    more = statistics.items_to_decide(statistic, n=test.n, alpha=alpha) if statistic > 0 and not superior else None
    target = TargetVerdict(
        name=name,
        superior=superior,
        n=test.n,
        champion=levels[1],
        challenger=levels[0],
        gain=test.mean,
        low=test.low,
        high=test.high,
        confidence=confidence,
        min_gain=min_gain,
        p_value=test.p_value,
        sd=test.sd,
        bootstrap_low=low,
        bootstrap_high=high,
        detectable_gain=statistics.detectable_mean(test.n, sd=test.sd, alpha=alpha),
        prompts_to_decide=more,
        reason="",
    )
    return target.model_copy(update={"reason": _explain_target(target)})


def conclude(
    guards: tuple[GuardVerdict, ...], *, target: TargetVerdict, same_model: bool
) -> tuple[Decision, tuple[str, ...]]:
    """Return the decision and the reasons that made it."""
    if same_model:
        return Decision.hold, ("challenger and champion are the same model: there is nothing to promote",)
    worse = tuple(guard.reason for guard in guards if guard.state is GuardState.inferior)
    if worse:
        return Decision.reject, worse
    open_ends = tuple(guard.reason for guard in guards if guard.state is GuardState.undecided)
    if not target.superior:
        open_ends += (target.reason,)
    if open_ends:
        return Decision.hold, open_ends
    return Decision.promote, (target.reason, *(guard.reason for guard in guards))


def flag_guard(guard: GuardVerdict) -> list[str]:
    """Return what a reader should know before believing this guard."""
    flags = []
    if guard.margin < guard.smallest_margin:
        flags.append(
            f"{guard.benchmark}: {guard.n} items at discordance {guard.discordance:.3f} can hold a margin of "
            f"{100 * guard.smallest_margin:.1f} points or more; the policy's {100 * guard.margin:g} would often hold back "
            "an equal model"
        )
    if guard.champion == 0 or guard.challenger == 0:
        who = (
            "both models" if guard.champion == guard.challenger else "champion" if guard.champion == 0 else "challenger"
        )
        flags.append(
            f"{guard.benchmark}: {who} scored 0 on all {guard.n} items; look at the samples before believing it"
        )
    if guard.n < FEW_ITEMS and guard.method == TANGO:
        flags.append(f"{guard.benchmark}: {guard.n} items are few; the test can err in 9 % of cases where 5 % is asked")
    if guard.discordance == 0:
        flags.append(f"{guard.benchmark}: both models score alike on every one of {guard.n} items")
    return flags


def flag_target(target: TargetVerdict) -> list[str]:
    """Return what a reader should know before believing the target."""
    if target.sd == 0:
        return [f"{target.name}: the gain is {target.gain:+.4f} on every prompt; without spread nothing can be shown"]
    if target.superior != (target.bootstrap_low > target.min_gain):
        return [
            f"{target.name}: paired t [{target.low:+.4f}, {target.high:+.4f}] and bootstrap [{target.bootstrap_low:+.4f}, "
            f"{target.bootstrap_high:+.4f}] disagree about a gain above {target.min_gain:g}; the t interval decides"
        ]
    return []


def write_verdict(verdict: Verdict, path: Path) -> None:
    """Write verdict.json atomically."""
    write_json(path, verdict.model_dump(mode="json"))


def _test_binary(won: int, lost: int, *, n: int, margin: float, alpha: float) -> dict[str, Any]:
    low, high = statistics.tango_interval(won, lost, n=n, confidence=1 - 2 * alpha)
    p_one_sided = statistics.mcnemar_midp(won, lost)
    discordance = max(won + lost, 1) / n  # none seen is not none: plan with one
    return {
        "statistic": statistics.score_statistic(won, lost, n=n, difference=-margin),
        "critical": float(stats.norm.ppf(1 - alpha)),
        "low": low,
        "high": high,
        "method": TANGO,
        "p_difference": 2 * min(p_one_sided, 1 - p_one_sided),
        "detectable_difference": statistics.detectable_difference(n, discordance=discordance, alpha=alpha),
        "smallest_margin": statistics.smallest_margin(n, discordance=discordance, alpha=alpha),
    }


def _test_continuous(difference_N: Scores, *, margin: float, alpha: float) -> dict[str, Any]:
    test = statistics.paired_t(difference_N, alpha=alpha)
    # Without spread all items moved alike; the mean itself is then compared with the margin.
    error = max(test.sd / np.sqrt(test.n), np.finfo(float).tiny)
    return {
        "statistic": float((test.mean + margin) / error),
        "critical": float(stats.t.ppf(1 - alpha, test.n - 1)),
        "low": test.low,
        "high": test.high,
        "method": "paired t interval",
        "p_difference": 2 * min(test.p_value, 1 - test.p_value) if test.sd > 0 else float(test.mean == 0),
        "detectable_difference": statistics.detectable_mean(test.n, sd=test.sd, alpha=alpha),
        "smallest_margin": statistics.smallest_margin(test.n, discordance=test.sd**2, alpha=alpha),
    }


def _explain_guard(guard: GuardVerdict) -> str:
    numbers = (
        f"{100 * guard.champion:.1f} → {100 * guard.challenger:.1f} on {guard.n} items, difference "
        f"{100 * guard.difference:+.1f} [{100 * guard.low:+.1f}, {100 * guard.high:+.1f}] points at {guard.confidence:.0%}"
    )
    margin = f"{100 * guard.margin:g} points"
    if guard.state is GuardState.non_inferior:
        return f"{guard.benchmark}: not worse by {margin} or more: {numbers}"
    if guard.state is GuardState.inferior:
        return f"{guard.benchmark}: shown worse than the margin of {margin}: {numbers}"
    would = "no number of items at these rates would"
    if guard.items_to_decide is not None:
        would = f"about {guard.items_to_decide} items at these rates would"
    return f"{guard.benchmark}: undecided against the margin of {margin}: {numbers}; {would} decide it"


def _explain_target(target: TargetVerdict) -> str:
    bound = f" above {target.min_gain:g}" if target.min_gain else ""
    p_value = f"= {target.p_value:.2g}" if target.p_value >= 1e-4 else "< 0.0001"
    numbers = (
        f"{target.champion:.3f} → {target.challenger:.3f} over {target.n} prompts, gain {target.gain:+.3f} "
        f"[{target.low:+.3f}, {target.high:+.3f}] at {target.confidence:.0%}, p {p_value}"
    )
    if target.superior:
        return f"{target.name}: a gain{bound} is shown: {numbers}"
    would = "no number of prompts" if target.prompts_to_decide is None else f"about {target.prompts_to_decide} prompts"
    return f"{target.name}: a gain{bound} is not shown: {numbers}; {would} at these rates would show it"


def _pair_benchmarks(
    challenger: list[BenchmarkResult], champion: list[BenchmarkResult]
) -> dict[str, tuple[Scores, Scores]]:
    ours, theirs = ({result.benchmark: result for result in side} for side in (challenger, champion))
    assert len(ours) == len(challenger) and len(theirs) == len(champion), "a benchmark is given twice"
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"gate: both models need the same benchmarks; only the challenger has {sorted(ours.keys() - theirs.keys())}, "
            f"only the champion has {sorted(theirs.keys() - ours.keys())}; evaluate both on the same suite"
        )
    return {name: pair_items(ours[name], theirs[name]) for name in sorted(ours)}


def _pair_rewards(
    challenger: Mapping[str, float], champion: Mapping[str, float], *, prompts: Mapping[str, str] | None
) -> tuple[Scores, tuple[float, float]]:
    only = [len(challenger.keys() - champion.keys()), len(champion.keys() - challenger.keys())]
    if any(only):
        raise ValueError(
            f"gate: held-out rewards must be of the same rows; {only[0]} of {len(challenger)} are the challenger's alone "
            f"and {only[1]} of {len(champion)} the champion's alone; generate and score both from the same rows"
        )
    rows = sorted(challenger)
    if len(rows) < 2:
        raise ValueError(f"gate: at least 2 held-out prompts are needed for an interval; got {len(rows)}")
    names = [prompts[row] for row in rows] if prompts is not None else rows
    ours, theirs = (statistics.average_clusters([side[row] for row in rows], names) for side in (challenger, champion))
    return ours - theirs, (float(ours.mean()), float(theirs.mean()))


def _flag_limits(results: list[BenchmarkResult]) -> list[str]:
    limits = {result.benchmark: result.profile.get("config", {}).get("limit") for result in results}
    cut = ", ".join(f"{name} ({limit} items per task)" for name, limit in limits.items() if limit is not None)
    return [f"limited, and so no full score: {cut}"] if cut else []
