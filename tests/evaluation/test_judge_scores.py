"""Scores of judgements, worked by hand and against independent implementations."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from evaluation.judges.config import EndpointJudge, JudgeConfig
from evaluation.judges.judge import Judgement, Pair, Reply
from evaluation.judges.judging import measure_draws
from evaluation.judges.prompt import PAIRWISE
from evaluation.judges.scores import (
    STRONG_WEIGHT,
    accuracies,
    describe_judge,
    describe_lengths,
    gather,
    win_rate,
)
from evaluation.statistics import bootstrap_weighted_mean, score_interval, wilson_interval

Margins = Sequence[tuple[int | None, int | None]]


def judge(margins: Margins, *, groups: Sequence[str] = (), texts: Sequence[tuple[str, str]] = ()) -> list[Judgement]:
    """Return judgements of pairs with these margins of ours, with ours first and with theirs first."""
    made = []
    for number, both in enumerate(margins):
        ours, theirs = texts[number] if texts else ("ours", "theirs")
        pair = Pair(str(number), groups[number] if groups else "all", str(number), "q", ours, theirs)
        replies = [Reply("said", "stop", "judge", 1, 1)]
        made += [
            Judgement(pair, order, 0, [], margin, list(replies))
            for order, margin in zip(("ours_first", "theirs_first"), both, strict=True)
        ]
    return made


def test_arena_hards_score_by_hand() -> None:
    """Verdicts A>>B and A>B for ours, a tie and a loss, a strong loss and a win: (3 + 1 + 0.5 + 0 + 0 + 1) / (3 + 1 + 1 + 1 + 3 + 1)."""
    judged = gather(judge([(2, 1), (0, -1), (-2, 1)]))
    assert win_rate(judged, strong_weight=STRONG_WEIGHT).value == pytest.approx(5.5 / 10)
    assert win_rate(judged).value == pytest.approx((1 + 1 + 0.5 + 0 + 0 + 1) / 6)


@pytest.mark.parametrize("margin", [2, 1, -1])
def test_a_rate_that_no_question_disagrees_with_has_the_interval_of_a_coin_and_no_spread(margin: int) -> None:
    rate = win_rate(gather(judge([(margin, margin)] * 8)), strong_weight=STRONG_WEIGHT)
    won = 8 if margin > 0 else 0
    assert rate.value == won / 8 and rate.stderr is None
    assert (rate.low, rate.high) == pytest.approx(wilson_interval(won, n=8, confidence=0.95))
    assert 0.3 < rate.high - rate.low < 0.4


def test_ties_alone_are_no_certainty_of_one_half() -> None:
    rate = win_rate(gather(judge([(0, 0)] * 4)))
    assert rate.value == 0.5 and rate.low + rate.high == pytest.approx(1)
    assert (rate.low, rate.high) == pytest.approx(wilson_interval(2, n=4, confidence=0.95))
    one = win_rate(gather(judge([(1, -1)])))
    assert one.low < 0.15 and one.high > 0.85, "one question says next to nothing"


def draw_margins(n: int, *, seed: int) -> list[tuple[int, int]]:
    drawn = np.random.default_rng(seed).choice([-2, -1, 0, 1, 2], size=(n, 2), p=[0.2, 0.3, 0.1, 0.25, 0.15])
    return [(int(a), int(b)) for a, b in drawn]


@pytest.mark.parametrize("seed", range(4))
def test_with_one_baseline_bradley_terry_is_the_weighted_mean(seed: int) -> None:
    """Fitted as the leaderboard does it: a row of +1 and -1 for the two models, strong verdicts three times, a tie as half a win of each."""
    margins = draw_margins(40, seed=seed)
    design, won, weight = [], [], []
    for margin in (margin for both in margins for margin in both):
        times = STRONG_WEIGHT if abs(margin) == 2 else 1
        for winner in (1, 0) if margin == 0 else (int(margin > 0),):
            design.append([1.0, -1.0])  # the model, the baseline
            won.append(winner)
            weight.append(times / (2 if margin == 0 else 1))
    fit = LogisticRegression(fit_intercept=False, C=1e10, tol=1e-10, max_iter=1000)
    fit.fit(np.array(design), np.array(won), sample_weight=np.array(weight))
    model, baseline = fit.coef_[0]
    assert win_rate(gather(judge(margins)), strong_weight=STRONG_WEIGHT).value == pytest.approx(
        1 / (1 + math.exp(baseline - model)), abs=1e-6
    )


def test_the_interval_is_of_questions_not_of_rows() -> None:
    """Strong verdicts that agree in both orders are six equal rows of one question: rows alone would make it root of 6 too narrow."""
    n, wins = 400, 120
    rate = win_rate(gather(judge([(2, 2)] * wins + [(-2, -2)] * (n - wins))), strong_weight=STRONG_WEIGHT)
    expected = math.sqrt(0.3 * 0.7 / n)
    assert rate.value == pytest.approx(0.3) and rate.stderr == pytest.approx(expected, rel=0.06)
    assert (rate.high - rate.low) / 2 == pytest.approx(1.96 * expected, rel=0.08)
    rows = np.repeat([1.0] * wins + [0.0] * (n - wins), 6)
    naive = bootstrap_weighted_mean(rows, np.ones(6 * n), np.arange(6 * n), confidence=0.95, seed=0)
    assert rate.stderr / naive.stderr == pytest.approx(math.sqrt(6), rel=0.08)


def test_the_spread_of_a_weighted_mean_is_that_of_a_ratio() -> None:
    """Linearised: the standard deviation over questions of (sum of weighted scores - value x sum of weights) / mean weight."""
    margins = draw_margins(500, seed=9)
    rate = win_rate(gather(judge(margins)), strong_weight=STRONG_WEIGHT)
    weight = np.array([[STRONG_WEIGHT if abs(m) == 2 else 1 for m in both] for both in margins])
    score = np.array([[(np.sign(m) + 1) / 2 for m in both] for both in margins])
    residual = (weight * (score - rate.value)).sum(axis=1) / weight.sum(axis=1).mean()
    assert rate.stderr == pytest.approx(residual.std(ddof=1) / math.sqrt(len(margins)), rel=0.06)


def test_a_pair_with_one_verdict_counts_for_nothing_but_the_count() -> None:
    judgements = judge([(1, 1), (1, None), (None, None), (-1, 0)])
    judged = gather(judgements)
    assert [pair.pair.id for pair in judged.counted] == ["0", "3"]
    assert win_rate(judged).value == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    found = describe_judge(judged, judgements)
    assert (found["pairs"], found["unparseable_pairs"], found["unparseable_judgements"]) == (4, 2, 3)


def test_what_is_said_of_the_judge_by_hand() -> None:
    """Ours first / theirs first: agree, first place twice, second place, tie twice, tie against win."""
    judgements = judge([(1, 2), (1, -1), (2, -1), (-1, 1), (0, 0), (0, 1)])
    found = describe_judge(gather(judgements), judgements)
    assert found["position_bias"] == pytest.approx(3 / 6)
    assert (found["prefers_first"], found["prefers_second"]) == pytest.approx((2 / 6, 1 / 6))
    assert found["order_agreement"] == pytest.approx(2 / 6)
    assert found["tie_share"] == pytest.approx(3 / 12)
    assert found["position_bias_low"] < 0.5 < found["position_bias_high"]


def test_the_noise_of_a_drawing_judge_by_hand() -> None:
    """Three pairs, judged twice: of the pairs' scores 1, 1/4, 1/2 and 1, 1/2, 1 two differ; the win rates are 5.5 / 10 and 7 / 8, or, of
    the better answers of a set, the accuracies 1.75 / 3 and 2.5 / 3. A pair that lacks a verdict in one repeat counts in none."""
    first, second = judge([(2, 1), (0, -1), (-2, 1), (1, 1)]), judge([(2, 1), (0, 0), (1, 1), (1, None)])
    judged = gather([*first, *(replace(judgement, repeat=1) for judgement in second)])
    asked = EndpointJudge(model="m", revision="1", temperature=1.0)
    for benchmark, moved in (("arena_hard", 7 / 8 - 5.5 / 10), ("heldout", 0.75 / 3), ("llmbar", 0.75 / 3)):
        config = JudgeConfig.model_validate({"benchmark": benchmark, "judge": asked, "repeats": 2})
        found = measure_draws(judged, config=config, judge="m@1", prompt=PAIRWISE)
        assert found == pytest.approx({"flip_rate": 2 / 3, "max_difference": moved})


def test_accuracy_by_group_with_its_interval() -> None:
    judged = gather(judge([(1, 1), (1, -1), (-1, -1), (1, 0)], groups=["a", "a", "b", "b"]))
    found = accuracies(judged)
    assert {group: row["value"] for group, row in found.items()} == {"a": 0.75, "b": 0.375, "": 0.5625}
    assert (found[""]["n"], found[""]["consistent"]) == (4, 0.25)
    assert (found[""]["low"], found[""]["high"]) == score_interval([1, 0.5, 0, 0.75])


def test_how_often_the_longer_answer_wins() -> None:
    texts = [("long answer", "short"), ("a", "much longer"), ("same", "same"), ("", "text")]
    found = describe_lengths(gather(judge([(1, 1), (1, -1), (1, 1), (-1, -1)], texts=texts)))
    assert found["longer_wins"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert (found["mean_answer_chars"], found["mean_other_answer_chars"], found["empty_answers"]) == (4.0, 6.0, 1)
