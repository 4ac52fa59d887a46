"""Each statistic against a value from elsewhere: a published table, another method, or enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from evaluation import statistics
from evaluation.gate.policy import smallest_margin

# (won, lost, n, confidence) -> interval, as published.
PUBLISHED_TANGO = [
    # Airway hyper-responsiveness (Bentur 2009), in Fagerland, Lydersen, Laake, Stat. Med. 33 (2014) 2850: -0.517 to -0.026.
    ((1, 7, 21, 0.95), (-0.517, -0.026)),
    # R, PropCIs::scoreci.mp(25, 28, 618, 0.90), whose difference is (second - first) / n: -0.0148 to 0.0247.
    ((28, 25, 618, 0.90), (-0.0148, 0.0247)),
    # R, PropCIs::scoreci.mp(41, 48, 549, 0.90), as a study of two matching methods prints it: -1.57 to 4.14 points.
    ((48, 41, 549, 0.90), (-0.0157, 0.0414)),
    # Disinfection of contact lenses, Tango (1998): -0.118 to 0.059.
    ((0, 1, 44, 0.95), (-0.118, 0.059)),
    # Response to consolidation therapy (Cavo 2012), R, contingencytables of Fagerland, Lydersen, Laake, Statistical Analysis of
    # Contingency Tables (2017), chapter 8: -0.1240 to -0.0054.
    ((6, 16, 161, 0.95), (-0.1240, -0.0054)),
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
    # The therapy of Cavo (2012), as above: Z = -2.132.
    assert statistics.score_statistic(6, 16, n=161, difference=0.0) == pytest.approx(-2.132, abs=5e-4)


@pytest.mark.parametrize(
    ("won", "lost", "published"),
    [
        (1, 7, 0.0391),  # Fagerland, Lydersen, Laake (2013), airway data; the exact test has 0.0703
        (6, 16, 0.034690),  # the therapy of Cavo (2012), as above; the exact test has 0.052479
    ],
)
def test_mcnemar_midp_equals_published_values(won: int, lost: int, published: float) -> None:
    p = statistics.mcnemar_midp(won, lost)
    assert 2 * min(p, 1 - p) == pytest.approx(published, abs=5e-5)
    assert statistics.mcnemar_midp(lost, won) == pytest.approx(1 - p)
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


# NIST StRD, one-way analysis of variance, data set SiRstv (5 instruments, 5 measurements each of a silicon wafer).
SIRSTV = [
    [196.3052, 196.1240, 196.1890, 196.2569, 196.3403],
    [196.3042, 196.3825, 196.1669, 196.3257, 196.0422],
    [196.1303, 196.2005, 196.2889, 196.0343, 196.1811],
    [196.2795, 196.1748, 196.1494, 196.1485, 195.9885],
    [196.2119, 196.1051, 196.1850, 196.0052, 196.2090],
]


def test_spread_within_strata_equals_nists_certified_value() -> None:
    test = statistics.stratified_t(np.ravel(SIRSTV), np.repeat(list("abcde"), 5), alpha=0.05)
    assert test.sd == pytest.approx(
        0.104076068334656, abs=1e-9
    )  # certified residual standard deviation, 20 degrees of freedom
    assert test.high - test.mean == pytest.approx(test.sd / 5 * stats.t.ppf(0.95, 20))
    f = 5 * np.var([np.mean(row) for row in SIRSTV], ddof=1) / test.sd**2
    assert f == pytest.approx(1.18046237440255, abs=1e-6)  # certified F


def test_strata_take_out_what_they_differ_by_and_nothing_else() -> None:
    noise = np.random.default_rng(0).normal(size=300)
    shift = np.repeat([-2.0, 0.0, 2.0], 100)
    subjects = np.repeat(list("xyz"), 100)
    pooled, within = (
        statistics.paired_t(noise + shift, alpha=0.05),
        statistics.stratified_t(noise + shift, subjects, alpha=0.05),
    )
    assert within.mean == pooled.mean and within.sd < 0.6 * pooled.sd
    assert statistics.stratified_t(noise + shift, ["all"] * 300, alpha=0.05) == pooled
    # lm-eval's pooled_sample_stderr of the three tasks
    sizes, stderrs = [100] * 3, [float(np.std(part, ddof=1)) / 10 for part in np.split(noise, 3)]
    variance = sum((n - 1) * se**2 * n for n, se in zip(sizes, stderrs, strict=True)) / (300 - 3)
    assert within.sd / math.sqrt(300) == pytest.approx(math.sqrt(variance / 300))


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


def test_detectable_difference_of_the_unweighted_mean() -> None:
    sizes = [164, 1319, 6511, 14042]
    delta = statistics.detectable_average(sizes, discordances=[0.1] * 4, alpha=0.05)
    assert 100 * delta == pytest.approx(1.65, abs=0.005)
    one = statistics.detectable_average([164], discordances=[0.1], alpha=0.05)
    assert one == pytest.approx(statistics.detectable_difference(164, discordance=0.1, alpha=0.05))


@pytest.mark.parametrize(
    ("discordance", "difference", "alpha", "power", "pairs"),
    [
        (0.50, 0.40, 0.05, 0.90, 23),  # powersamplesize.com, McNemar one-sided, after Connor (1987) p. 209
        (0.50, 0.40, 0.025, 0.80, 23),  # zarathucorp's open-powersamplesize, two-sided at 0.05
        (0.45, 0.15, 0.025, 0.80, 155),  # clinicaltrials-tools, McNemar two-sided at 0.05
    ],
)
def test_detectable_difference_equals_published_sample_sizes(
    discordance: float, difference: float, alpha: float, power: float, pairs: int
) -> None:
    shown = [
        statistics.detectable_difference(n, discordance=discordance, alpha=alpha, power=power)
        for n in (pairs, pairs - 1)
    ]
    assert shown[0] <= difference < shown[1]


def test_combined_intervals_equal_newcombes_hybrid_score() -> None:
    # Newcombe, Stat. Med. 17 (1998) 873, table II, method 10: 56/70 against 48/80 has a difference of 0.0524 to 0.3339.
    parts = [
        statistics.wilson_interval(56, n=70, confidence=0.95),
        statistics.wilson_interval(48, n=80, confidence=0.95),
    ]
    ends = statistics.combine_intervals([56 / 70, 48 / 80], parts, coefficients=[1.0, -1.0])
    assert ends == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(("right", "n", "ends"), [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))])
def test_wilson_equals_published_intervals_and_inverts_the_level_test(
    right: int, n: int, ends: tuple[float, float]
) -> None:
    # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3.
    found = statistics.wilson_interval(right, n=n, confidence=0.95)
    assert found == pytest.approx(ends, abs=5e-5)
    z = stats.norm.ppf(0.975)
    assert statistics.level_test(right, n=n, level=found[0]) == pytest.approx(z)
    assert statistics.level_test(right, n=n, level=found[1]) == pytest.approx(-z)


def test_gain_at_equal_length_is_the_intercept_with_its_error() -> None:
    # Anscombe (1973), first quartet: y = 3.0001 + 0.5001 x, standard error of the intercept 1.1247 (as R's lm prints it).
    x = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    test = statistics.gain_at_equal_length(y, x, alpha=0.025)
    assert test is not None and test.mean == pytest.approx(3.0001, abs=5e-5)
    assert test.sd / math.sqrt(11) == pytest.approx(1.1247, abs=5e-5)
    assert test.p_value * 2 == pytest.approx(0.02573, abs=5e-6)  # its p there, 9 degrees of freedom
    assert statistics.gain_at_equal_length([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], alpha=0.05) is None


def test_noise_floor_by_hand() -> None:
    runs = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    noise = statistics.measure_noise(runs)
    assert noise.flip_rate == pytest.approx((1 / 4 + 2 / 4 + 3 / 4) / 3)
    assert noise.max_difference == pytest.approx(3 / 4)
    greedy = statistics.measure_noise([runs[0], runs[0]])
    assert (greedy.flip_rate, greedy.max_difference) == (0, 0)
    with pytest.raises(ValueError, match="at least 2 runs"):
        statistics.measure_noise(runs[:1])


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


def test_detectable_mean_equals_gpowers_worked_example() -> None:
    # G*Power 3, user guide, matched pairs, after Cohen (1969) p. 48: d_z = 0.421637 in 50 pairs, two-sided at 0.05, has power 0.832114.
    found = statistics.detectable_mean(50, sd=1.0, alpha=0.025, power=0.832114)
    assert found == pytest.approx(0.421637, abs=5e-7)


def test_detectable_mean_has_its_power() -> None:
    delta = statistics.detectable_mean(40, sd=2.0, alpha=0.05)
    data = np.random.default_rng(0).normal(delta, 2.0, size=(20_000, 40))
    p = stats.ttest_1samp(data, 0.0, axis=1, alternative="greater").pvalue
    assert np.mean(p <= 0.05) == pytest.approx(0.8, abs=0.01)


def test_smallest_margin_is_the_published_factor() -> None:
    assert smallest_margin(164, discordance=0.1, alpha=0.05) == pytest.approx(3.29 * math.sqrt(0.1 / 164), rel=1e-3)


@pytest.mark.parametrize(("n", "margin", "discordance"), [(164, 0.09, 0.1), (400, 0.05, 0.1), (100, 0.1, 0.05)])
def test_passing_power_is_that_of_all_outcomes_or_a_little_less(n: int, margin: float, discordance: float) -> None:
    exact = passing_rate(n, margin=margin, difference=0.0, discordance=discordance)
    said = statistics.passing_power(n, discordance=discordance, margin=margin, alpha=0.05)
    assert exact - 0.015 < said <= exact


def test_effects_are_rounded_up_so_that_what_is_printed_is_enough() -> None:
    assert [statistics.round_up(x) for x in (0.1763, 0.0607, 0.18, 1.0, 123.4)] == [0.18, 0.061, 0.18, 1.0, 130.0]


def test_items_to_decide_do_decide() -> None:
    won, lost, n, margin = 3, 5, 100, 0.05
    z = statistics.score_statistic(won, lost, n=n, difference=-margin)
    needed = statistics.items_to_decide(z, n=n, alpha=0.05, power=0.5)
    assert needed is not None and needed > n
    times = math.ceil(needed / n)
    assert statistics.score_statistic(won * times, lost * times, n=n * times, difference=-margin) > stats.norm.ppf(0.95)
    assert statistics.items_to_decide(0.0, n=n, alpha=0.05) is None


@pytest.mark.parametrize(("t", "n"), [(4.0, 2), (1.5, 5), (1.0, 20), (0.4, 60)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_as_many_items_decide_by_the_t_test_that_was_taken(t: float, n: int, alpha: float) -> None:
    assert stats.t.sf(t, n - 1) > alpha, "not decided yet"
    needed = statistics.items_to_decide(t, n=n, alpha=alpha, student=True)
    assert needed is not None and needed > n
    power = stats.nct.sf(stats.t.ppf(1 - alpha, needed - 1), needed - 1, t * math.sqrt(needed / n))
    assert power > 0.72 and (power < 0.88 or needed == n + 1)


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
    margin = smallest_margin(1319, discordance=0.1, alpha=0.05)
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
