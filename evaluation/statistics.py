"""Intervals, tests and sample sizes of paired scores: two models, the same items. SciPy has the distributions, this has the rest.

Legend: `won` counts the items only the challenger has right, `lost` those only the champion has right, `n` all pairs. A
difference is challenger minus champion; scores run from 0 to 1. `alpha` is the error rate of one one-sided test, and the
interval printed beside such a test has two-sided confidence 1 - 2 alpha, so that its end and the test agree.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

PLANNED_POWER = 0.8  # of every printed detectable effect and every printed number of items
LIMIT_TOLERANCE = 1e-12  # of the ends of an interval, in score


@dataclass(frozen=True)
class MeanTest:
    """A mean of independent differences, its interval of confidence 1 - 2 alpha, and the one-sided p that it is above `minimum`."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p_value: float


def normal_quantile(p: float) -> float:
    """Return what a standard normal variable stays below with probability p."""
    return float(special.ndtri(p))


def t_quantile(p: float, free: int) -> float:
    """Return what Student's t on `free` degrees of freedom stays below with probability p."""
    return float(special.stdtrit(free, p))


def score_statistic(won: float, lost: float, *, n: int, difference: float) -> float:
    """Return Tango's score statistic against the hypothesis p(won) - p(lost) = `difference`, standard normal under it.

    The variance takes the likelihood's best p(lost) under the hypothesis, which is why it stays right at few items, at no
    discordance and far from 0, where the Wald interval does not. Source: Tango, Statistics in Medicine 17 (1998) 891-908.
    """
    _check_counts(won, lost, n=n)
    surplus = won - lost - n * difference
    if surplus == 0:
        return 0.0
    linear = (2 * n - won + lost) * difference - won - lost
    constant = -lost * difference * (1 - difference)
    root = math.sqrt(max(linear**2 - 8 * n * constant, 0.0))
    # The larger root of 2n q^2 + linear q + constant = 0, in the form that subtracts no two equal numbers.
    q_lost = (root - linear) / (4 * n) if linear <= 0 else -2 * constant / (linear + root)
    variance = n * (2 * q_lost + difference * (1 - difference))
    return surplus / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, surplus)


def tango_interval(won: int, lost: int, *, n: int, confidence: float) -> tuple[float, float]:
    """Return the differences that the score test does not reject; finite at zero discordance: +- z^2 / (n + z^2)."""
    _check_counts(won, lost, n=n)
    z = normal_quantile((1 + confidence) / 2)
    observed = (won - lost) / n

    def end(sign: int) -> float:
        if observed == sign:
            return float(sign)
        low, high = sorted((observed, sign * (1 - LIMIT_TOLERANCE)))
        return optimize.brentq(
            lambda difference: score_statistic(won, lost, n=n, difference=difference) + sign * z,
            low,
            high,
            xtol=LIMIT_TOLERANCE,
        )

    return end(-1), end(1)


def mcnemar_midp(won: int, lost: int) -> float:
    """Return the one-sided mid-p of `won` > `lost` given their sum; 0.5 when nothing is discordant.

    The two-sided value is 2 min(p, 1 - p). Source: Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13 (2013) 91.
    """
    _check_counts(won, lost, n=max(won + lost, 1))
    return float(stats.binom.sf(won, won + lost, 0.5) + stats.binom.pmf(won, won + lost, 0.5) / 2)


def paired_t(differences: ArrayLike, *, alpha: float, minimum: float = 0.0) -> MeanTest:
    """Return mean, interval and one-sided p of independent differences (n,). Without spread the interval is the mean itself,
    and p is 0 or 1: the caller must say that nothing was estimated."""
    d_N = np.asarray(differences, dtype=np.float64)
    _check_differences(d_N, least=2)
    return _test_mean(
        float(d_N.mean()), float(d_N.std(ddof=1)), n=len(d_N), free=len(d_N) - 1, alpha=alpha, minimum=minimum
    )


def _test_mean(mean: float, sd: float, *, n: int, free: int, alpha: float, minimum: float) -> MeanTest:
    if sd <= 1e-12 * max(1.0, abs(mean)):  # rounding of equal numbers
        return MeanTest(n=n, mean=mean, sd=0.0, low=mean, high=mean, p_value=float(mean <= minimum))
    error = sd / math.sqrt(n)
    reach = error * t_quantile(1 - alpha, free)
    p_value = float(special.stdtr(free, (minimum - mean) / error))
    return MeanTest(n=n, mean=mean, sd=sd, low=mean - reach, high=mean + reach, p_value=p_value)


def stratified_t(differences: ArrayLike, strata: ArrayLike, *, alpha: float, minimum: float = 0.0) -> MeanTest:
    """Return mean, interval and one-sided p of differences (n,) drawn from fixed strata, as a benchmark's subjects are.

    What strata differ by is no error of the mean, so the spread is the one within them: the residual mean square of a one-way
    analysis of variance, on n - k degrees of freedom for k strata. It is also how lm-eval pools the standard errors of a
    group's tasks. With one stratum, or where each holds one item, it is `paired_t`.
    """
    d_N = np.asarray(differences, dtype=np.float64)
    _check_differences(d_N, least=2)
    names_K, stratum_N = np.unique(np.asarray(strata), return_inverse=True)
    assert stratum_N.shape == d_N.shape, f"{stratum_N.shape} strata for {d_N.shape} differences"
    n, free = len(d_N), len(d_N) - len(names_K)
    if len(names_K) == 1 or free == 0:
        return paired_t(d_N, alpha=alpha, minimum=minimum)
    mean_K = np.bincount(stratum_N, weights=d_N) / np.bincount(stratum_N)
    mean, sd = float(d_N.mean()), math.sqrt(float(((d_N - mean_K[stratum_N]) ** 2).sum()) / free)
    return _test_mean(mean, sd, n=n, free=free, alpha=alpha, minimum=minimum)


def average_clusters(differences: ArrayLike, clusters: ArrayLike) -> NDArray[np.float64]:
    """Return the mean difference of each cluster (G,): answers to one prompt are not independent, their means over prompts are."""
    d_N = np.asarray(differences, dtype=np.float64)
    _check_differences(d_N, least=1)
    names_G, group_N = np.unique(np.asarray(clusters), return_inverse=True)
    assert group_N.shape == d_N.shape, f"{group_N.shape} clusters for {d_N.shape} differences"
    return np.bincount(group_N, weights=d_N) / np.bincount(group_N, minlength=len(names_G))


def bootstrap_interval(
    differences: ArrayLike, clusters: ArrayLike, *, confidence: float, seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """Return the percentile interval of the mean of cluster means, drawing whole clusters with replacement; equal for equal seeds."""
    mean_G = average_clusters(differences, clusters)
    means = [mean_G[drawn_RG].mean(axis=1) for drawn_RG in _draw(len(mean_G), seed=seed, resamples=resamples)]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _draw(count: int, *, seed: int, resamples: int) -> Iterator[NDArray[np.int32]]:
    """Yield resamples of `count` things with replacement, as indices (R, count), so many at a time as memory is to take."""
    draw = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // count)  # bounds memory, and is part of no result: rows are drawn in order
    for start in range(0, resamples, chunk):
        yield draw.integers(count, size=(min(chunk, resamples - start), count), dtype=np.int32)


@dataclass(frozen=True)
class WeightedMean:
    """A weighted mean of clusters that were drawn, with its percentile interval and the spread of its resamples."""

    value: float
    low: float
    high: float
    stderr: float | None  # None where the resamples have no spread


def bootstrap_weighted_mean(
    scores: ArrayLike, weights: ArrayLike, clusters: ArrayLike, *, confidence: float, seed: int, resamples: int = 2000
) -> WeightedMean:
    """Return the weighted mean of scores (n,) with its interval, drawing whole clusters with replacement; equal for equal seeds.

    Rows of one cluster are not independent (a question's verdicts in both orders, and a verdict that counts several times), so drawing
    rows would give too narrow an interval.
    """
    score_N, weight_N = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    _check_differences(score_N, least=1)
    names_G, group_N = np.unique(np.asarray(clusters), return_inverse=True)
    assert group_N.shape == score_N.shape == weight_N.shape and (weight_N > 0).all(), f"{weight_N.shape} weights"
    sum_G = np.bincount(group_N, weights=score_N * weight_N)
    size_G = np.bincount(group_N, weights=weight_N)
    draws = _draw(len(names_G), seed=seed, resamples=resamples)
    means = [sum_G[drawn_RG].sum(axis=1) / size_G[drawn_RG].sum(axis=1) for drawn_RG in draws]
    mean_R = np.concatenate(means)
    low, high = np.quantile(mean_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(sum_G.sum() / size_G.sum())
    return WeightedMean(value, float(low), float(high), float(mean_R.std(ddof=1)))


def adjust_holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values (m,) adjusted for naming no target beforehand: reject those at or below alpha. Holm, Scand. J. Stat. 6 (1979) 65."""
    p_M = np.asarray(p_values, dtype=np.float64)
    if p_M.ndim != 1 or len(p_M) == 0 or not np.all((p_M >= 0) & (p_M <= 1)):
        raise ValueError(
            f"Holm's adjustment: p-values must be a non-empty list of numbers from 0 to 1; got {p_M.tolist()}"
        )
    order_M = np.argsort(p_M, kind="stable")
    stepped_M = np.maximum.accumulate(p_M[order_M] * np.arange(len(p_M), 0, -1))
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.minimum(stepped_M, 1.0)
    return adjusted_M


def detectable_difference(n: int, *, discordance: float, alpha: float, power: float = PLANNED_POWER) -> float:
    """Return the true difference of a paired binary score that `n` items show with `power`; at most the discordance itself.

    Solves D = (z_alpha sqrt(psi) + z_power sqrt(psi - D^2)) / sqrt(n). Source: Connor, Biometrics 43 (1987) 207.
    """
    _check_counts(0, 0, n=n)
    if not 0 < discordance <= 1:
        raise ValueError(f"minimum detectable effect: the discordance must be above 0 and at most 1; got {discordance}")
    z_alpha, z_power = (normal_quantile(p) for p in (1 - alpha, power))

    def shortfall(difference: float) -> float:
        spread = math.sqrt(max(discordance - difference**2, 0.0))
        return difference - (z_alpha * math.sqrt(discordance) + z_power * spread) / math.sqrt(n)

    # |difference| <= discordance always: where even that is not shown by n items, that is the honest answer's bound.
    return discordance if shortfall(discordance) < 0 else float(optimize.brentq(shortfall, 0.0, discordance))


def detectable_average(sizes: Sequence[int], *, discordances: Sequence[float], alpha: float) -> float:
    """Return the true difference of the unweighted mean of several benchmarks that is shown with `PLANNED_POWER`.

    As `detectable_difference`, each benchmark moving by the same: D = (z_alpha sqrt(V(0)) + z_power sqrt(V(D))) / m with
    V(D) = sum((psi_b - D^2) / n_b) over m benchmarks.
    """
    n_B, psi_B = np.asarray(sizes, dtype=np.float64), np.asarray(discordances, dtype=np.float64)
    assert n_B.shape == psi_B.shape and len(n_B) > 0, f"{n_B.shape} sizes and {psi_B.shape} discordances"
    z_alpha, z_power = (normal_quantile(p) for p in (1 - alpha, PLANNED_POWER))

    def shortfall(difference: float) -> float:
        spread = math.sqrt(float((np.maximum(psi_B - difference**2, 0.0) / n_B).sum()))
        return difference - (z_alpha * math.sqrt(float((psi_B / n_B).sum())) + z_power * spread) / len(n_B)

    largest = float(psi_B.mean())
    return largest if shortfall(largest) < 0 else float(optimize.brentq(shortfall, 0.0, largest))


def combine_intervals(
    estimates: ArrayLike, intervals: Sequence[tuple[float, float]], *, coefficients: ArrayLike
) -> tuple[float, float]:
    """Return the interval of sum(c_i x_i) of independent estimates from the interval of each, of the same confidence.

    MOVER: each end moves by the root of the sum of squared distances to the ends of the parts, so that a skewed part stays
    skewed and one without discordance keeps its width. Source: Zou, Donner, Statistics in Medicine 27 (2008) 1693.
    """
    x_B, c_B = np.asarray(estimates, dtype=np.float64), np.asarray(coefficients, dtype=np.float64)
    end_B2 = np.asarray(intervals, dtype=np.float64)
    assert end_B2.shape == (*x_B.shape, 2) and c_B.shape == x_B.shape, (
        f"{x_B.shape} estimates, {end_B2.shape} intervals"
    )
    moved_B2 = np.sort(c_B[:, None] * (end_B2 - x_B[:, None]), axis=1)
    below, above = np.sqrt((moved_B2**2).sum(axis=0))
    middle = float((c_B * x_B).sum())
    return middle - float(below), middle + float(above)


def level_test(successes: float, *, n: int, level: float) -> float:
    """Return the score statistic of a rate against a fixed `level` between 0 and 1; its inversion is Wilson's interval."""
    _check_counts(0, 0, n=n)
    return (successes - n * level) / math.sqrt(n * level * (1 - level))


def wilson_interval(successes: float, *, n: int, confidence: float) -> tuple[float, float]:
    """Return the levels that `level_test` does not reject. Source: Wilson, JASA 22 (1927) 209."""
    _check_counts(successes, 0, n=n)
    z, rate = normal_quantile((1 + confidence) / 2), successes / n
    middle = (n * rate + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * math.sqrt(n * rate * (1 - rate) + z**2 / 4)
    return 0.0 if successes == 0 else middle - reach, 1.0 if successes == n else middle + reach


def score_interval(items: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of one model's mean of item scores from 0 to 1: Wilson's where each is 0 or 1, else Student's within 0 and 1.

    Of one item that is neither 0 nor 1 nothing is known: (0, 1).
    """
    score_N = np.asarray(items, dtype=np.float64)
    if np.isin(score_N, (0, 1)).all():
        return wilson_interval(int(score_N.sum()), n=len(score_N), confidence=confidence)
    if len(score_N) < 2:
        return 0.0, 1.0
    mean, error = float(score_N.mean()), float(score_N.std(ddof=1)) / math.sqrt(len(score_N))
    reach = t_quantile((1 + confidence) / 2, len(score_N) - 1) * error
    return max(0.0, mean - reach), min(1.0, mean + reach)


def gain_at_equal_length(gains: ArrayLike, growths: ArrayLike, *, alpha: float) -> MeanTest | None:
    """Return the mean gain where the answers did not grow: the intercept of the gains (n,) over the growths (n,), and its test.

    None where the growths have no spread or there are fewer than 3 prompts: then length and gain cannot be told apart.
    """
    gain_N, growth_N = np.asarray(gains, dtype=np.float64), np.asarray(growths, dtype=np.float64)
    _check_differences(gain_N, least=1)
    _check_differences(growth_N, least=1)
    n = len(gain_N)
    if n < 3 or np.ptp(growth_N) <= 1e-12 * max(1.0, float(np.abs(growth_N).max())):
        return None
    line = stats.linregress(growth_N, gain_N)
    sd = float(line.intercept_stderr) * math.sqrt(n)
    return _test_mean(float(line.intercept), sd, n=n, free=n - 2, alpha=alpha, minimum=0.0)


@dataclass(frozen=True)
class NoiseFloor:
    """How far one model's score moves when nothing about the model changed. A greedy rerun alone gives 0."""

    runs: int
    n: int
    flip_rate: float  # share of items whose score differs between two runs, the mean over all pairs of runs
    max_difference: float  # the largest difference of the score between two runs


def measure_noise(scores: ArrayLike) -> NoiseFloor:
    """Return the noise floor of scores (R, n) of one model over the same items: runs that vary batch, workers, few-shot seed
    or repeat a judge, and nothing else."""
    score_RN = np.asarray(scores, dtype=np.float64)
    if score_RN.ndim != 2 or score_RN.shape[0] < 2 or score_RN.shape[1] < 1:
        raise ValueError(
            f"noise floor: got scores of shape {score_RN.shape}, expected at least 2 runs over the same items"
        )
    if not np.isfinite(score_RN).all():
        raise ValueError(f"noise floor: {int((~np.isfinite(score_RN)).sum())} of {score_RN.size} scores are not finite")
    runs, n = score_RN.shape
    flips = [float((score_RN[a] != score_RN[b]).mean()) for a in range(runs) for b in range(a)]
    mean_R = score_RN.mean(axis=1)
    return NoiseFloor(runs, n, math.fsum(flips) / len(flips), float(mean_R.max() - mean_R.min()))


def detectable_mean(n: int, *, sd: float, alpha: float, power: float = PLANNED_POWER) -> float:
    """Return the true mean that a one-sided paired t test over `n` differences of spread `sd` shows with `power`."""
    assert n >= 2, f"{n} differences have no spread"
    return _detectable_shift(n, alpha=alpha, power=power) * sd / math.sqrt(n)


@cache
def _detectable_shift(n: int, *, alpha: float, power: float) -> float:
    critical = t_quantile(1 - alpha, n - 1)

    def shortfall(shift: float) -> float:
        return float(stats.nct.sf(critical, n - 1, shift)) - power

    return float(optimize.brentq(shortfall, 0.0, critical + 40.0))


def passing_power(n: int, *, discordance: float, margin: float, alpha: float) -> float:
    """Return how likely two equal models pass the score test against a margin: the normal approximation around the statistic
    and its variance at the expected counts."""
    half = n * discordance / 2
    statistic = score_statistic(half, half, n=n, difference=-margin)
    fitted = n * (margin / statistic) ** 2  # the variance of one difference that the test reckons with
    return float(
        special.ndtr((margin * math.sqrt(n) - normal_quantile(1 - alpha) * math.sqrt(fitted)) / math.sqrt(discordance))
    )


def round_up(value: float, *, digits: int = 2) -> float:
    """Return a value rounded up to so many significant digits, as an effect is printed that should be enough."""
    if value <= 0:
        return value
    places = digits - 1 - math.floor(math.log10(value))
    return round(math.ceil(round(value * 10**places, 9)) / 10**places, max(places, 0))


def items_to_decide(
    statistic: float, *, n: int, alpha: float, student: bool = False, power: float = PLANNED_POWER
) -> int | None:
    """Return how many items, more than the `n` there are, would decide with `power` if the observed rates were the true ones; None
    where no number would.

    A statistic at fixed rates grows with the root of the number of items. A score statistic is normal; where `student`, a t test needs
    z_alpha^2 / 2 more. Source: Guenther, The American Statistician 35 (1981) 243.
    """
    if abs(statistic) < 1e-9:
        return None
    z_alpha = normal_quantile(1 - alpha)
    needed = n * ((z_alpha + normal_quantile(power)) / statistic) ** 2 + (z_alpha**2 / 2 if student else 0.0)
    return max(math.ceil(needed), n + 1)


def _check_counts(won: float, lost: float, *, n: int) -> None:
    if n < 1:
        raise ValueError(f"paired score: no items to compare; got n = {n}, expected at least 1")
    if won < 0 or lost < 0 or won + lost > n:
        raise ValueError(
            f"paired score: {won} won and {lost} lost of {n} items; expected counts that add up to n at most"
        )


def _check_differences(d_N: NDArray[np.float64], *, least: int) -> None:
    if d_N.ndim != 1 or len(d_N) < least:
        raise ValueError(f"paired differences: got shape {d_N.shape}, expected a list of at least {least}")
    if not np.isfinite(d_N).all():
        bad = np.flatnonzero(~np.isfinite(d_N))
        raise ValueError(f"paired differences: {len(bad)} of {len(d_N)} are not finite (first at {bad[0]})")
