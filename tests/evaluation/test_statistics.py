"""Each statistic against a value from elsewhere: a published table, another method, or enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from evaluation import statistics

# (won, lost, n, confidence) -> interval, as published.
PUBLISHED_TANGO = [
    # Airway hyper-responsiveness (Bentur 2009), in Fagerland, Lydersen, Laake, Stat. Med. 33 (2014) 2850: -0.517 to -0.026.
    ((1, 7, 21, 0.95), (-0.517, -0.026)),
    # R, PropCIs::scoreci.mp(25, 28, 618, 0.90), whose difference is (second - first) / n: -0.0148 to 0.0247.
    ((28, 25, 618, 0.90), (-0.0148, 0.0247)),
    # Disinfection of contact lenses, Tango (1998): -0.118 to 0.059.
    ((0, 1, 44, 0.95), (-0.118, 0.059)),
]


@pytest.mark.parametrize(("table", "expected"), PUBLISHED_TANGO)
def test_tango_equals_published_intervals(table: tuple[int, int, int, float], expected: tuple[float, float]) -> None:
    won, lost, n, confidence = table
    assert statistics.tango_interval(won, lost, n=n, confidence=confidence) == pytest.approx(expected, abs=5e-4)


def test_tango_equals_published_equivalence_test() -> None:
    # Tango (1998), crossover of two disinfection systems: Z = 1.709, p = 0.044 against a margin of 0.1.
    z = statistics.score_statistic(0, 1, n=44, difference=-0.1)
    assert z == pytest.approx(1.709, abs=5e-4)
    assert stats.norm.sf(z) == pytest.approx(0.044, abs=5e-4)


def pearson_under_constraint(won: int, lost: int, n: int, difference: float) -> float:
    """The score statistic another way: Pearson's chi-square against the numerically fitted constrained multinomial."""

    def loss(p_lost: float) -> float:
        cells = np.array([p_lost + difference, p_lost, 1 - 2 * p_lost - difference])
        counts = np.array([won, lost, n - won - lost])
        return -float(np.sum(counts[counts > 0] * np.log(np.maximum(cells[counts > 0], 1e-300))))

    low, high = max(0.0, -difference), (1 - difference) / 2
    p_lost = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    expected = n * np.array([p_lost + difference, p_lost, 1 - 2 * p_lost - difference])
    observed = np.array([won, lost, n - won - lost])
    return float(np.sum((observed - expected) ** 2 / expected))


@pytest.mark.parametrize(("won", "lost", "n"), [(1, 7, 21), (40, 20, 160), (9, 11, 164), (3, 2, 8), (120, 95, 1319)])
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.0, 0.02, 0.25])
def test_score_statistic_is_pearson_of_the_constrained_fit(won: int, lost: int, n: int, difference: float) -> None:
    ours = statistics.score_statistic(won, lost, n=n, difference=difference)
    assert ours**2 == pytest.approx(pearson_under_constraint(won, lost, n, difference), rel=1e-4, abs=1e-8)
    assert math.copysign(1, ours) == math.copysign(1, (won - lost) / n - difference) or ours == 0


@pytest.mark.parametrize(
    ("won", "lost", "n"), [(1, 7, 21), (9, 11, 164), (0, 5, 30), (30, 0, 30), (0, 0, 8), (5, 5, 10)]
)
def test_interval_ends_are_where_the_test_turns(won: int, lost: int, n: int) -> None:
    z = stats.norm.ppf(0.95)
    low, high = statistics.tango_interval(won, lost, n=n, confidence=0.9)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 1:
            assert statistics.score_statistic(won, lost, n=n, difference=end) == pytest.approx(sign * z, abs=1e-5)


def test_interval_mirrors_when_the_models_swap() -> None:
    low, high = statistics.tango_interval(12, 5, n=50, confidence=0.9)
    assert statistics.tango_interval(5, 12, n=50, confidence=0.9) == pytest.approx((-high, -low), abs=1e-9)


def test_no_discordance_still_has_a_finite_interval() -> None:
    z_squared = stats.norm.ppf(0.95) ** 2
    end = z_squared / (164 + z_squared)  # by hand: T(d) = -sqrt(n d / (1 - d)) = -z
    assert statistics.tango_interval(0, 0, n=164, confidence=0.9) == pytest.approx((-end, end), abs=1e-9)


def test_score_statistic_at_zero_is_mcnemar() -> None:
    assert statistics.score_statistic(15, 6, n=80, difference=0.0) == pytest.approx(9 / math.sqrt(21))


def test_mcnemar_midp_equals_published_value() -> None:
    # Fagerland, Lydersen, Laake (2013), airway data 1 against 7: two-sided mid-p 0.0391, exact 0.0703.
    p = statistics.mcnemar_midp(1, 7)
    assert 2 * min(p, 1 - p) == pytest.approx(0.0391, abs=5e-5)
    assert statistics.mcnemar_midp(7, 1) == pytest.approx(1 - p)
    assert statistics.mcnemar_midp(0, 0) == 0.5


def test_mcnemar_midp_by_counting_every_outcome() -> None:
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=9)]
    expected = (sum(k > 6 for k in outcomes) + sum(k == 6 for k in outcomes) / 2) / len(outcomes)
    assert statistics.mcnemar_midp(6, 3) == pytest.approx(expected)


# Student's sleep data (1908), second drug minus first: mean 1.58, t = 4.0621, two-sided p = 0.002833 on 9 degrees of freedom.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]


def test_paired_t_equals_students_sleep_data() -> None:
    test = statistics.paired_t(SLEEP, alpha=0.025)
    assert test.mean == pytest.approx(1.58)
    assert (test.low, test.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)  # as R prints it
    assert 2 * test.p_value == pytest.approx(0.002833, abs=5e-7)


def test_paired_t_against_a_minimum_equals_scipy() -> None:
    expected = stats.ttest_1samp(SLEEP, 1.0, alternative="greater")
    assert statistics.paired_t(SLEEP, alpha=0.05, minimum=1.0).p_value == pytest.approx(expected.pvalue)


def test_identical_differences_have_no_spread_and_say_so() -> None:
    nothing = statistics.paired_t([0.0] * 5, alpha=0.05)
    assert (nothing.sd, nothing.low, nothing.high, nothing.p_value) == (0, 0, 0, 1)
    assert statistics.paired_t([0.1 + 0.2] * 7, alpha=0.05).sd == 0  # rounding is not spread


def test_bootstrap_agrees_with_scipy_and_repeats() -> None:
    data = np.random.default_rng(3).gamma(2.0, size=60)
    ours = statistics.bootstrap_interval(data, np.arange(60), confidence=0.9, seed=5, resamples=20_000)
    theirs = stats.bootstrap(
        (data,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(9)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours == statistics.bootstrap_interval(data, np.arange(60), confidence=0.9, seed=5, resamples=20_000)
    assert ours != statistics.bootstrap_interval(data, np.arange(60), confidence=0.9, seed=6, resamples=20_000)


def test_bootstrap_draws_prompts_and_not_answers() -> None:
    prompts = np.random.default_rng(0).normal(size=40)
    names = np.arange(40)
    once = statistics.bootstrap_interval(prompts, names, confidence=0.9, seed=1)
    tenfold = statistics.bootstrap_interval(np.repeat(prompts, 10), np.repeat(names, 10), confidence=0.9, seed=1)
    assert tenfold == pytest.approx(once)  # ten copies of each answer are no new evidence
    rows = statistics.bootstrap_interval(np.repeat(prompts, 10), np.arange(400), confidence=0.9, seed=1)
    assert rows[1] - rows[0] < 0.5 * (once[1] - once[0])  # what ignoring the clusters would have claimed


def test_average_clusters_by_hand() -> None:
    assert statistics.average_clusters([1.0, 3.0, 10.0], ["a", "a", "b"]).tolist() == [2.0, 10.0]


def test_holm_equals_a_worked_example() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02.
    assert statistics.adjust_holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.adjust_holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="from 0 to 1"):
        statistics.adjust_holm([0.5, 1.5])


@pytest.mark.parametrize(("n", "points"), [(164, 6.1), (1319, 2.2), (6511, 1.0), (14042, 0.7)])
def test_detectable_difference_of_the_four_benchmarks(n: int, points: float) -> None:
    delta = statistics.detectable_difference(n, discordance=0.1, alpha=0.05)
    assert 100 * delta == pytest.approx(points, abs=0.05)


def test_detectable_difference_has_its_power_by_enumeration() -> None:
    n, psi, alpha = 400, 0.1, 0.05
    delta = statistics.detectable_difference(n, discordance=psi, alpha=alpha)
    discordant = np.arange(n + 1)
    power = 0.0
    for count, chance in zip(discordant, stats.binom.pmf(discordant, n, psi), strict=True):
        if chance > 1e-9:
            won = np.arange(count + 1)
            shown = [statistics.mcnemar_midp(int(w), int(count - w)) <= alpha for w in won]
            power += chance * float(stats.binom.pmf(won, count, (1 + delta / psi) / 2)[shown].sum())
    assert power == pytest.approx(0.8, abs=0.02)


def test_detectable_difference_never_exceeds_the_discordance() -> None:
    assert statistics.detectable_difference(8, discordance=0.1, alpha=0.05) == 0.1


def test_detectable_mean_has_its_power() -> None:
    delta = statistics.detectable_mean(40, sd=2.0, alpha=0.05)
    data = np.random.default_rng(0).normal(delta, 2.0, size=(20_000, 40))
    p = stats.ttest_1samp(data, 0.0, axis=1, alternative="greater").pvalue
    assert np.mean(p <= 0.05) == pytest.approx(0.8, abs=0.01)


def test_smallest_margin_is_the_published_factor() -> None:
    assert statistics.smallest_margin(164, discordance=0.1, alpha=0.05) == pytest.approx(
        3.29 * math.sqrt(0.1 / 164), rel=1e-3
    )


def test_items_to_decide_do_decide() -> None:
    won, lost, n, margin = 3, 5, 100, 0.05
    z = statistics.score_statistic(won, lost, n=n, difference=-margin)
    needed = statistics.items_to_decide(z, n=n, alpha=0.05, power=0.5)
    assert needed is not None and needed > n
    times = math.ceil(needed / n)
    assert statistics.score_statistic(won * times, lost * times, n=n * times, difference=-margin) > stats.norm.ppf(0.95)
    assert statistics.items_to_decide(0.0, n=n, alpha=0.05) is None


def passing_rate(n: int, *, margin: float, difference: float, discordance: float) -> float:
    """Return how often a guard passes, by adding up every outcome."""
    p_won, p_lost = (discordance + difference) / 2, (discordance - difference) / 2
    won, lost = (axis.ravel() for axis in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    counts = np.stack([won, lost, n - won - lost], axis=1)[won + lost <= n]
    chance = stats.multinomial.pmf(counts, n, [p_won, p_lost, 1 - discordance])
    z = stats.norm.ppf(0.95)
    likely = chance > 1e-9
    return sum(
        float(p)
        for (w, x, _), p in zip(counts[likely].tolist(), chance[likely], strict=True)
        if statistics.score_statistic(w, x, n=n, difference=-margin) > z
    )


@pytest.mark.parametrize(("n", "bound"), [(10, 0.09), (50, 0.06), (164, 0.06)])
@pytest.mark.parametrize("margin", [0.05, 0.1, 0.35])
@pytest.mark.parametrize("extra", [0.0, 0.1, 0.4])
def test_guard_at_its_margin_passes_about_as_often_as_alpha(n: int, bound: float, margin: float, extra: float) -> None:
    assert passing_rate(n, margin=margin, difference=-margin, discordance=margin + extra) <= bound


@pytest.mark.parametrize(
    ("n", "margin", "passes"), [(36, 0.25, 0.99), (10, 0.45, 0.94), (8, 0.45, 0.94), (16, 0.35, 0.97)]
)
def test_equal_models_pass_the_margins_that_small_demos_are_advised(n: int, margin: float, passes: float) -> None:
    assert passing_rate(n, margin=margin, difference=0.0, discordance=0.1) >= passes


def test_smallest_margin_lets_equal_models_pass_at_a_real_size() -> None:
    margin = statistics.smallest_margin(1319, discordance=0.1, alpha=0.05)
    z = stats.norm.ppf(0.95)
    draws = np.random.default_rng(0).multinomial(1319, [0.05, 0.05, 0.9], size=4000)
    passed = [statistics.score_statistic(int(w), int(x), n=1319, difference=-margin) > z for w, x, _ in draws]
    assert np.mean(passed) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.tango_interval(0, 0, n=0, confidence=0.9), "no items"),
        (lambda: statistics.tango_interval(5, 6, n=10, confidence=0.9), "5 won and 6 lost of 10"),
        (lambda: statistics.paired_t([], alpha=0.05), "at least 2"),
        (lambda: statistics.paired_t([1.0], alpha=0.05), "at least 2"),
        (lambda: statistics.paired_t([1.0, math.nan], alpha=0.05), "1 of 2 are not finite"),
        (lambda: statistics.bootstrap_interval([], [], confidence=0.9, seed=0), "at least 1"),
        (lambda: statistics.detectable_difference(10, discordance=0.0, alpha=0.05), "above 0"),
    ],
)
def test_refusals(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
