"""The parts of a verdict: one guard, one target, one floor, one bound, each tested and put into words. evaluation.gate.decide puts
them together; docs/gate.md gives tests and formulas.

Legend: N items or prompts. Scores run from 0 to 1, differences are challenger minus champion, `alpha` is one-sided.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evaluation import statistics
from evaluation.gate import explain
from evaluation.gate.policy import smallest_margin
from evaluation.gate.verdict import (
    AuditRow,
    BoundState,
    FloorVerdict,
    GrowthVerdict,
    GuardState,
    GuardVerdict,
    MeanVerdict,
    TargetVerdict,
)

BOOTSTRAP_SEED = 20_241_105  # fixed, so that equal inputs give the equal verdict
TANGO = "Tango score interval"
PAIRED_T = "paired t interval"
STRATIFIED_T = "paired t interval within tasks"
MCNEMAR, SCORE_TEST = "mid-p McNemar", "Tango score test"
ITEMS, PROMPTS = "items", "prompts"
LENGTH, COST = "length", "cost"
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Scores of both models over the same items or prompts, and which stratum each belongs to."""

    challenger_N: Scores
    champion_N: Scores
    stratum_N: NDArray[np.int64]

    @property
    def binary(self) -> bool:
        return all(bool(((side == 0) | (side == 1)).all()) for side in (self.challenger_N, self.champion_N))

    @property
    def strata(self) -> int:
        return int(self.stratum_N.max()) + 1

    def counts(self) -> tuple[int, int, int]:
        """Return (n, won, lost)."""
        difference_N = self.challenger_N - self.champion_N
        return len(difference_N), int((difference_N > 0).sum()), int((difference_N < 0).sum())

    def choose(self, chosen_N: NDArray[np.bool_]) -> "Pairs":
        """Return some of the pairs."""
        kept = np.unique(self.stratum_N[chosen_N], return_inverse=True)[1]
        return Pairs(self.challenger_N[chosen_N], self.champion_N[chosen_N], kept)


def pair_scores(challenger_N: Scores, champion_N: Scores) -> Pairs:
    """Return scores as pairs of one stratum."""
    return Pairs(challenger_N, champion_N, np.zeros(len(challenger_N), dtype=np.int64))


def compare_guard(benchmark: str, pairs: Pairs, *, margin: float, alpha: float) -> GuardVerdict:
    """Test non-inferiority of paired item scores: Tango's score test where each is 0 or 1, else a t test within tasks."""
    n, won, lost = pairs.counts()
    within = (
        statistics.stratified_t(pairs.challenger_N - pairs.champion_N, pairs.stratum_N, alpha=alpha) if n > 1 else None
    )
    if pairs.binary:
        tested = _test_binary(won, lost, n=n, margin=margin, alpha=alpha)
    else:
        assert within, "one item without a right and a wrong has no interval"
        tested = _test_continuous(within, strata=pairs.strata, margin=margin, alpha=alpha)
    statistic, critical = tested.pop("statistic"), tested.pop("critical")
    state = GuardState.undecided
    if abs(statistic) >= critical:
        state = GuardState.non_inferior if statistic > 0 else GuardState.inferior
    more = None
    if state is GuardState.undecided:
        more = statistics.items_to_decide(statistic, n=n, alpha=alpha, student=not pairs.binary)
    guard = GuardVerdict(
        benchmark=benchmark,
        state=state,
        n=n,
        champion=float(pairs.champion_N.mean()),
        challenger=float(pairs.challenger_N.mean()),
        difference=float((pairs.challenger_N - pairs.champion_N).mean()),
        confidence=1 - 2 * alpha,
        margin=margin,
        won=won,
        lost=lost,
        discordance=(won + lost) / n,
        items_to_decide=more,
        strata=pairs.strata,
        stratified_low=within.low if within else tested["low"],
        stratified_high=within.high if within else tested["high"],
        reason="",
        **tested,
    )
    return guard.model_copy(update={"reason": explain.explain_guard(guard)})


def compare_target(
    name: str, gain_N: Scores, *, levels: tuple[float, float], alpha: float, min_gain: float
) -> TargetVerdict:
    """Test whether the mean gain over prompts (n,) exceeds `min_gain`; `levels` are both means, challenger first."""
    if len(gain_N) < 2:
        raise ValueError(f"gate: {name} needs at least 2 held-out prompts to have an interval; got {len(gain_N)}")
    test = statistics.paired_t(gain_N, alpha=alpha, minimum=min_gain)
    statistic = _standardise(test.mean - min_gain, test) if test.sd > 0 else 0.0
    detectable = statistics.detectable_mean(test.n, sd=test.sd, alpha=alpha)
    return _describe_target(
        name, test, gain_N, levels=levels, alpha=alpha, min_gain=min_gain, unit=PROMPTS, method=PAIRED_T,
        interval=(test.low, test.high), p_value=_believe(test), statistic=statistic, detectable=detectable,
    )  # fmt: skip


def compare_benchmark(name: str, pairs: Pairs, *, alpha: float, min_gain: float) -> TargetVerdict:
    """Test whether a benchmark's score rises by more than `min_gain`: mid-p McNemar, or the score test of a gain above 0;
    a t test within tasks where scores are not 0 or 1."""
    gain_N = pairs.challenger_N - pairs.champion_N
    if len(gain_N) < 2:
        raise ValueError(f"gate: {name} needs at least 2 items to be a target; got {len(gain_N)}")
    n, won, lost = pairs.counts()
    discordance = max(won + lost, 1) / n if pairs.binary else None
    if discordance is not None:
        # Not within tasks: where one is all won and another all alike, no score is without a spread.
        test = statistics.paired_t(gain_N, alpha=alpha)
        statistic = statistics.score_statistic(won, lost, n=n, difference=min_gain)
        p_value = statistics.mcnemar_midp(won, lost) if min_gain == 0 else float(special.ndtr(-statistic))
        interval = statistics.tango_interval(won, lost, n=n, confidence=1 - 2 * alpha)
        detectable = statistics.detectable_difference(n, discordance=discordance, alpha=alpha)
        method = MCNEMAR if min_gain == 0 else SCORE_TEST
    else:
        test = statistics.stratified_t(gain_N, pairs.stratum_N, alpha=alpha, minimum=min_gain)
        statistic = _standardise(test.mean - min_gain, test) if test.sd > 0 else 0.0
        p_value, interval, method = _believe(test), (test.low, test.high), STRATIFIED_T
        detectable = statistics.detectable_mean(n, sd=test.sd, alpha=alpha)
    return _describe_target(
        name, test, gain_N, levels=(float(pairs.challenger_N.mean()), float(pairs.champion_N.mean())), alpha=alpha,
        min_gain=min_gain, unit=ITEMS, method=method, interval=interval, p_value=p_value, statistic=statistic,
        detectable=detectable, discordance=discordance,
    )  # fmt: skip


def _describe_target(
    name: str, test: statistics.MeanTest, gain_N: Scores, *, levels: tuple[float, float], alpha: float, min_gain: float,
    unit: str, method: str, interval: tuple[float, float], p_value: float, statistic: float, detectable: float,
    discordance: float | None = None,
) -> TargetVerdict:  # fmt: skip
    confidence = 1 - 2 * alpha
    low, high = statistics.bootstrap_interval(gain_N, np.arange(test.n), confidence=confidence, seed=BOOTSTRAP_SEED)
    return TargetVerdict(
        name=name,
        superior=p_value <= alpha,
        unit=unit,
        method=method,
        n=test.n,
        champion=levels[1],
        challenger=levels[0],
        gain=test.mean,
        low=interval[0],
        high=interval[1],
        confidence=confidence,
        min_gain=min_gain,
        p_value=p_value,
        p_adjusted=p_value,
        sd=test.sd,
        discordance=discordance,
        bootstrap_low=low,
        bootstrap_high=high,
        detectable_gain=detectable,
        statistic=statistic,
        more_to_decide=None,
        reason="",
    )


def adjust_targets(targets: Sequence[TargetVerdict], *, alpha: float) -> tuple[TargetVerdict, ...]:
    """Return the targets as any one of them decides: with Holm's adjustment where they are several, and what would show each."""
    p_adjusted = statistics.adjust_holm([target.p_value for target in targets]).tolist()
    shown = sum(p <= alpha for p in p_adjusted)
    adjusted = []
    for target, p in zip(targets, p_adjusted, strict=True):
        more = None
        # A loss is not shown to be a gain by any number of prompts. Were one target more shown, Holm would have asked this much of it.
        if p > alpha and target.statistic is not None and target.statistic > 0:
            level, student = alpha / (len(targets) - shown), target.discordance is None
            more = statistics.items_to_decide(target.statistic, n=target.n, alpha=level, student=student)
        changed = target.model_copy(update={"p_adjusted": p, "superior": p <= alpha, "more_to_decide": more})
        adjusted.append(changed.model_copy(update={"reason": explain.explain_target(changed)}))
    return tuple(adjusted)


def find_promotable_gain(n: int, *, sd: float, discordance: float | None, passing: float, alpha: float) -> float | None:
    """Return the true gain, rounded up to two digits, at which the target and the guards together promote with power 0.8.

    `passing` is how likely the guards pass when no score of theirs changes. `discordance` is of a target whose scores are 0 or 1,
    and `sd` of any other. None where the guards alone pass more seldom than that.
    """
    power = statistics.PLANNED_POWER / passing
    if power >= 1 - 1e-6 or n < 2 or sd == 0:
        return None
    if discordance is not None:
        gain = statistics.detectable_difference(n, discordance=discordance, alpha=alpha, power=power)
    else:
        gain = statistics.detectable_mean(n, sd=sd, alpha=alpha, power=power)
    return statistics.round_up(gain)


def chance_to_pass(guard: GuardVerdict, *, alpha: float) -> float:
    """Return how likely equal models pass a guard of this size, discordance and margin."""
    discordance = max(guard.discordance, 1 / guard.n)
    return statistics.passing_power(guard.n, discordance=discordance, margin=guard.margin, alpha=alpha)


def add_promotable_gain(
    target: TargetVerdict, guards: Sequence[GuardVerdict], *, targets: int, alpha: float
) -> TargetVerdict:
    """Return a target with the gain that this gate would promote; of several targets each with its share of alpha."""
    passing = math.prod(chance_to_pass(guard, alpha=alpha) for guard in guards)
    gain = find_promotable_gain(
        target.n, sd=target.sd, discordance=target.discordance, passing=passing, alpha=alpha / targets
    )
    changed = target.model_copy(update={"promotable_gain": None if gain is None else target.min_gain + gain})
    return changed.model_copy(update={"reason": explain.explain_target(changed)})


def compare_floor(name: str, level_N: Scores, *, floor: float, unit: str, alpha: float) -> FloorVerdict:
    """Test the challenger's own level over items or prompts (n,) against a floor: Wilson's score test where each is 0 or 1."""
    n, confidence = len(level_N), 1 - 2 * alpha
    student = unit != ITEMS or not np.isin(level_N, (0, 1)).all()
    if not student:
        statistic = statistics.level_test(float(level_N.sum()), n=n, level=floor)
        critical = statistics.normal_quantile(1 - alpha)
        low, high = statistics.wilson_interval(int(level_N.sum()), n=n, confidence=confidence)
    else:
        test = statistics.paired_t(level_N, alpha=alpha)
        statistic, critical = _standardise(test.mean - floor, test), statistics.t_quantile(1 - alpha, n - 1)
        low, high = test.low, test.high
    state = _state_of(statistic, critical)
    more = None
    if state is BoundState.undecided:
        more = statistics.items_to_decide(statistic, n=n, alpha=alpha, student=student)
    verdict = FloorVerdict(
        name=name, state=state, unit=unit, n=n, level=float(level_N.mean()), low=low, high=high, confidence=confidence,
        floor=floor, more_to_decide=more, reason="",
    )  # fmt: skip
    return verdict.model_copy(update={"reason": explain.explain_floor(verdict)})


def compare_growth(
    name: str, challenger_N: Scores, champion_N: Scores, *, bound: float, unit: str, alpha: float
) -> GrowthVerdict:
    """Test over prompts (n,) whether the mean of something grew by no more than a share `bound` of the champion's.

    A paired t test of challenger - (1 + bound) champion, whose mean is below 0 exactly when the growth is below the bound.
    """
    test = statistics.paired_t(challenger_N - (1 + bound) * champion_N, alpha=alpha)
    statistic, critical = _standardise(-test.mean, test), statistics.t_quantile(1 - alpha, test.n - 1)
    state = BoundState.kept if test.sd == 0 and test.mean == 0 else _state_of(statistic, critical)
    more = None
    if state is BoundState.undecided:
        more = statistics.items_to_decide(statistic, n=test.n, alpha=alpha, student=True)
    champion, challenger = float(champion_N.mean()), float(challenger_N.mean())
    verdict = GrowthVerdict(
        name=name, state=state, unit=unit, n=test.n, champion=champion, challenger=challenger, bound=bound,
        growth=challenger / champion - 1 if champion > 0 else None, low=test.low, high=test.high, confidence=1 - 2 * alpha, more_to_decide=more,
        holds=state is BoundState.kept, reason="",
    )  # fmt: skip
    return verdict.model_copy(update={"reason": explain.explain_growth(verdict)})


def weigh_length(
    growth: GrowthVerdict, gain_N: Scores, growth_N: Scores, *, min_gain: float, alpha: float
) -> GrowthVerdict:
    """Return the bound on length with the reward's gain at equal length: longer answers may pass where that gain is shown."""
    test = statistics.gain_at_equal_length(gain_N, growth_N, alpha=alpha)
    if test is None:
        return growth
    shown = test.sd > 0 and test.low > min_gain
    weighed = growth.model_copy(
        update={
            "gain_at_equal_length": test.mean,
            "gain_low": test.low,
            "gain_high": test.high,
            "holds": growth.holds or shown,
        }
    )
    return weighed.model_copy(update={"reason": explain.explain_growth(weighed)})


def average_benchmarks(pairs: Mapping[str, Pairs], *, alpha: float) -> MeanVerdict:
    """Return the unweighted mean of several benchmarks' scores, with the interval that Tango's of each combine to (MOVER)."""
    counts = [each.counts() for each in pairs.values()]
    share, confidence = 1 / len(counts), 1 - 2 * alpha
    intervals = [statistics.tango_interval(won, lost, n=n, confidence=confidence) for n, won, lost in counts]
    difference_B = [(won - lost) / n for n, won, lost in counts]
    low, high = statistics.combine_intervals(difference_B, intervals, coefficients=[share] * len(counts))
    detectable = statistics.detectable_average(
        [n for n, _, _ in counts], discordances=[max(won + lost, 1) / n for n, won, lost in counts], alpha=alpha
    )
    champion, challenger = (
        sum(float(side.mean()) for side in sides) * share
        for sides in ([each.champion_N for each in pairs.values()], [each.challenger_N for each in pairs.values()])
    )
    return MeanVerdict(
        champion=champion, challenger=challenger, difference=sum(difference_B) * share, low=low, high=high,
        confidence=confidence, detectable_difference=detectable,
    )  # fmt: skip


def audit(name: str, pairs: Pairs, *, unit: str, decided: tuple[float, float], alpha: float) -> AuditRow:
    """Return a guard or a target on the audit split; `decided` is the interval on the items or prompts that decide."""
    n, won, lost = pairs.counts()
    if unit == ITEMS and pairs.binary:
        low, high = statistics.tango_interval(won, lost, n=n, confidence=1 - 2 * alpha)
    else:
        test = statistics.stratified_t(pairs.challenger_N - pairs.champion_N, pairs.stratum_N, alpha=alpha)
        low, high = test.low, test.high
    difference = float((pairs.challenger_N - pairs.champion_N).mean())
    agrees = low <= decided[1] and decided[0] <= high
    return AuditRow(
        name=name, unit=unit, n=n, difference=difference, low=low, high=high, confidence=1 - 2 * alpha, agrees=agrees
    )


def _standardise(excess: float, test: statistics.MeanTest) -> float:
    """Return an excess in standard errors. Without spread all moved alike, and the excess itself says on which side it lies."""
    if test.sd == 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess * math.sqrt(test.n) / test.sd


def _believe(test: statistics.MeanTest) -> float:
    """Return the p of a gain. One without spread shows nothing, and must not count as shown when several targets are adjusted."""
    return test.p_value if test.sd > 0 else 1.0


def _state_of(statistic: float, critical: float) -> BoundState:
    if abs(statistic) < critical:
        return BoundState.undecided
    return BoundState.kept if statistic > 0 else BoundState.broken


def _test_binary(won: int, lost: int, *, n: int, margin: float, alpha: float) -> dict[str, Any]:
    low, high = statistics.tango_interval(won, lost, n=n, confidence=1 - 2 * alpha)
    p_one_sided = statistics.mcnemar_midp(won, lost)
    discordance = max(won + lost, 1) / n  # none seen is not none: plan with one
    return {
        "statistic": statistics.score_statistic(won, lost, n=n, difference=-margin),
        "critical": statistics.normal_quantile(1 - alpha),
        "low": low,
        "high": high,
        "method": TANGO,
        "p_difference": 2 * min(p_one_sided, 1 - p_one_sided),
        "detectable_difference": statistics.detectable_difference(n, discordance=discordance, alpha=alpha),
        "smallest_margin": smallest_margin(n, discordance=discordance, alpha=alpha),
    }


def _test_continuous(test: statistics.MeanTest, *, strata: int, margin: float, alpha: float) -> dict[str, Any]:
    free = test.n - strata if 1 < strata < test.n else test.n - 1
    return {
        "statistic": _standardise(test.mean + margin, test),
        "critical": statistics.t_quantile(1 - alpha, free),
        "low": test.low,
        "high": test.high,
        "method": STRATIFIED_T if strata > 1 else PAIRED_T,
        "p_difference": 2 * min(test.p_value, 1 - test.p_value) if test.sd > 0 else float(test.mean == 0),
        "detectable_difference": statistics.detectable_mean(test.n, sd=test.sd, alpha=alpha),
        "smallest_margin": smallest_margin(test.n, discordance=test.sd**2, alpha=alpha),
    }
