"""What judgements say: win rates and accuracies with intervals, and how far the judge itself can be believed.

A pair counts only with a verdict in both orders (and every repeat of them): with one alone the judge's liking for a place would count as
the model's merit. What is left out is counted and shown, never taken for a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evaluation.judges.judge import Judgement, Pair
from evaluation.statistics import WeightedMean, bootstrap_weighted_mean, score_interval, wilson_interval

CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0
NO_WIDTH = 1e-9
STRONG_WEIGHT = 3  # of a ">>" in Arena-Hard's score

Row = dict[str, Any]


@dataclass(frozen=True)
class JudgedPair:
    """All judgements of one pair; `both` are (ours first, theirs first), a couple for each repeat."""

    pair: Pair
    both: tuple[tuple[Judgement, Judgement], ...]

    @cached_property
    def margins(self) -> list[int] | None:
        """Every verdict as a margin of ours, from -2 to 2; None when one is missing."""
        found = [judgement.margin for couple in self.both for judgement in couple]
        return None if None in found else [margin for margin in found if margin is not None]

    @property
    def score(self) -> float:
        """The mean verdict on ours: 1 better, 0 worse, 1/2 for a tie."""
        assert self.margins is not None
        return sum(map(to_score, self.margins)) / len(self.margins)


@dataclass
class Judged:
    """Pairs with all their verdicts, those without, and why."""

    counted: list[JudgedPair] = field(default_factory=list)
    lost: list[JudgedPair] = field(default_factory=list)


def gather(judgements: Sequence[Judgement]) -> Judged:
    """Return judgements by pair. Raises ValueError, with what was said, when no pair has its verdicts."""
    by_pair: dict[str, dict[tuple[int, str], Judgement]] = {}
    for judgement in judgements:
        by_pair.setdefault(judgement.pair.id, {})[judgement.repeat, judgement.order] = judgement
    judged = Judged()
    for found in by_pair.values():
        repeats = sorted({repeat for repeat, _ in found})
        both = tuple((found[repeat, "ours_first"], found[repeat, "theirs_first"]) for repeat in repeats)
        pair = JudgedPair(both[0][0].pair, both)
        (judged.lost if pair.margins is None else judged.counted).append(pair)
    if not judged.counted:
        said = "; ".join(repr(text) for text in show_lost(judged)[:3])
        raise ValueError(
            f"judge: none of {len(judged.lost)} pairs has a verdict in both orders; it answered {said}; expected a label such as "
            "[[A>B]]; take another judge, or a larger max_answer_tokens"
        )
    return judged


def take_repeats(judged: Judged) -> list[Judged]:
    """Return the pairs that count as each repeat alone judged them."""
    repeats = range(len(judged.counted[0].both))
    return [Judged([JudgedPair(pair.pair, (pair.both[repeat],)) for pair in judged.counted]) for repeat in repeats]


def to_score(margin: int) -> float:
    """Return 1 for a win, 1/2 for a tie, 0 for a loss."""
    return (np.sign(margin) + 1) / 2


def win_rate(judged: Judged, *, strong_weight: int = 1) -> WeightedMean:
    """Return the mean of all verdicts, ties as a half, with its interval by a bootstrap over what was drawn: questions.

    A strong verdict counts `strong_weight` times. Against one baseline this is the win probability of a Bradley-Terry model of
    the same verdicts: its likelihood is that of one coin.
    """
    rows = [
        (to_score(margin), strong_weight if abs(margin) == 2 else 1, pair.pair.cluster)
        for pair in judged.counted
        for margin in pair.margins or ()
    ]
    return rate_questions(*zip(*rows, strict=True))


def rate_questions(scores: ArrayLike, weights: ArrayLike, clusters: ArrayLike) -> WeightedMean:
    """Return the weighted mean of scores from 0 to 1, with its interval by a bootstrap over questions, which `clusters` name.

    Where all questions say the same, all won say, resamples do too, and of the spread nothing is known: the interval is then
    Wilson's of as many questions at that rate, since no scores from 0 to 1 spread further than a coin's, and there is no `stderr`.
    """
    rate = bootstrap_weighted_mean(scores, weights, clusters, confidence=CONFIDENCE, seed=BOOTSTRAP_SEED)
    if rate.high - rate.low > NO_WIDTH:
        return rate
    n = len(np.unique(np.asarray(clusters)))
    low, high = wilson_interval(rate.value * n, n=n, confidence=CONFIDENCE)
    return WeightedMean(rate.value, low, high, stderr=None)


def accuracies(judged: Judged) -> dict[str, Row]:
    """Return for each group, and for all items under "", how often the judge is right: `value`, interval, `stderr`, `n`.

    Ours is the better answer. An item is right by the share of its verdicts, a tie as a half, so a judge that follows the place is at 1/2.
    `consistent` is the share of items that are right in every verdict.
    """
    groups: dict[str, list[JudgedPair]] = {}
    for pair in judged.counted:
        groups.setdefault(pair.pair.group, []).append(pair)
    return {group: accuracy(pairs) for group, pairs in [*groups.items(), ("", judged.counted)]}


def accuracy(pairs: Sequence[JudgedPair]) -> Row:
    """Return how often a judge is right on some items."""
    score_N = np.array([pair.score for pair in pairs])
    low, high = score_interval(score_N, confidence=CONFIDENCE)
    stderr = float(score_N.std(ddof=1)) / len(score_N) ** 0.5 if len(score_N) > 1 else None
    consistent = float((score_N == 1).mean())
    return {
        "value": float(score_N.mean()),
        "low": low,
        "high": high,
        "stderr": stderr,
        "n": len(pairs),
        "consistent": consistent,
    }


def describe_judge(judged: Judged, judgements: Sequence[Judgement]) -> Row:
    """Return how far the judge can be believed, in flat figures.

    `position_bias`: share of couples whose verdict follows the place, and of those which. `order_agreement`: share in which
    both orders name the same winner. `repeat_agreement`: share of orders whose repeats all do, where there are several.
    """
    couples = [(a.first_ahead or 0, b.first_ahead or 0) for pair in judged.counted for a, b in pair.both]
    first = sum(a > 0 and b > 0 for a, b in couples)
    second = sum(a < 0 and b < 0 for a, b in couples)
    agree = sum(np.sign(a) == -np.sign(b) for a, b in couples)
    low, high = wilson_interval(first + second, n=len(couples), confidence=CONFIDENCE)
    replies = [reply for judgement in judgements for reply in judgement.replies]
    found: Row = {
        "position_bias": (first + second) / len(couples),
        "position_bias_low": low,
        "position_bias_high": high,
        "prefers_first": first / len(couples),
        "prefers_second": second / len(couples),
        "order_agreement": float(agree) / len(couples),
        "tie_share": sum(m == 0 for pair in judged.counted for m in pair.margins or ()) / (2 * len(couples)),
        "pairs": len(judged.counted) + len(judged.lost),
        "unparseable_pairs": len(judged.lost),
        "unparseable_judgements": sum(judgement.margin is None for judgement in judgements),
        "refused_judgements": sum(judgement.replies[-1].finish == "refused" for judgement in judgements),
        "asked_again": sum(len(judgement.replies) > 1 for judgement in judgements),
        "cut_replies": sum(reply.finish == "length" for reply in replies),
    }
    if len(judged.counted[0].both) > 1:
        found["repeat_agreement"] = agree_over_repeats(judged)
    return found


def agree_over_repeats(judged: Judged) -> float:
    """Return the share of orders in which every repeat names the same winner."""
    same = [
        len({np.sign(couple[place].margin or 0) for couple in pair.both}) == 1
        for pair in judged.counted
        for place in (0, 1)
    ]
    return sum(same) / len(same)


def describe_lengths(judged: Judged) -> Row:
    """Return how long the answers are, in characters, how many are empty or cut, and how often the judge takes the longer of two."""
    ours = [len(pair.pair.ours) for pair in judged.counted]
    theirs = [len(pair.pair.theirs) for pair in judged.counted]
    unlike = [pair for pair in judged.counted if len(pair.pair.ours) != len(pair.pair.theirs)]
    longer = [p.score if len(p.pair.ours) > len(p.pair.theirs) else 1 - p.score for p in unlike]
    return {
        "mean_answer_chars": sum(ours) / len(ours),
        "mean_other_answer_chars": sum(theirs) / len(theirs),
        "longer_wins": sum(longer) / len(longer) if longer else None,
        "empty_answers": sum(not pair.pair.ours.strip() for pair in judged.counted),
        "cut_answers": sum(pair.pair.ours_cut for pair in judged.counted),
        "cut_other_answers": sum(pair.pair.theirs_cut for pair in judged.counted),
    }


def show_lost(judged: Judged) -> list[str]:
    """Return the last words of every judgement without a verdict."""
    return [
        judgement.replies[-1].text[-200:]
        for pair in judged.lost
        for couple in pair.both
        for judgement in couple
        if judgement.margin is None
    ]
