"""Rewards as the weights take them: as they are, centred, clipped, or as quantiles. Applied to the whole train split, before
anything is made of the rewards; a prompt's rewards follow from that prompt alone.
"""

from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np

from training.objectives.objective import Columns, FloatArray
from training.objectives.weights import softmax_weights

# R responses, G groups (prompts), S sets of equal rewards within a group


class RewardTransform(StrEnum):
    """What the rewards become before weights are made of them."""

    none = "none"
    centred = "centred"
    clipped = "clipped"
    quantile = "quantile"


def transform_rewards(
    columns: Columns, transform: RewardTransform, *, clip: tuple[float | None, float | None], base_R: FloatArray
) -> Columns:
    """Return the columns with transformed rewards. `base_R` is the score without the reward: the log of pi_ref over
    the density that the responses come from, up to a constant."""
    assert columns.reward_R is not None
    reward_R = columns.reward_R
    if transform == RewardTransform.centred:
        count_G = np.bincount(columns.group_R)
        reward_R = reward_R - (np.bincount(columns.group_R, weights=reward_R) / count_G)[columns.group_R]
    elif transform == RewardTransform.clipped:
        reward_R = np.clip(reward_R, *clip)
    elif transform == RewardTransform.quantile:
        reward_R = quantiles(reward_R, base_R, columns.group_R)
    return replace(columns, reward_R=reward_R)


def quantiles(reward_R: FloatArray, base_R: FloatArray, group_R: np.ndarray) -> FloatArray:
    """Return the mid-rank quantile of each reward under pi_ref among its prompt's responses (QRPO, arXiv 2507.08068).

    P(r' < r) + P(r' = r) / 2, where r' is a response's reward and the response has probability proportional to exp(base): among
    samples of pi_ref all count alike, and the k-th of K different rewards becomes (k - 1/2) / K.
    """
    mass_R = softmax_weights(np.zeros_like(reward_R), base_R, group_R, lambda_=1.0) / np.bincount(group_R)[group_R]
    order = np.lexsort((reward_R, group_R))
    set_R = sets_of_equals(reward_R[order], group_R[order])
    mass_S: FloatArray = np.bincount(set_R, weights=mass_R[order]).astype(np.float64)
    first_S = np.unique(set_R, return_index=True)[1]
    group_S = group_R[order][first_S]
    below_S = sum_before(mass_S, group_S)
    quantile_R = np.empty_like(reward_R)
    quantile_R[order] = (below_S + mass_S / 2)[set_R]
    return quantile_R


def sum_before(mass_S: FloatArray, group_S: np.ndarray) -> FloatArray:
    """Return what stands before each number within its group, whose members are neighbours; of no other group, in rounding either."""
    place_S = np.arange(len(group_S)) - np.searchsorted(group_S, group_S)
    below_S = np.zeros_like(mass_S)
    for place in range(1, place_S.max() + 1):
        at = np.flatnonzero(place_S == place)
        below_S[at] = below_S[at - 1] + mass_S[at - 1]
    return below_S


def sets_of_equals(reward_R: FloatArray, group_R: np.ndarray) -> np.ndarray:
    """Return the number, from 0, of the set of equal rewards within a group that each response is in; both come sorted."""
    is_new_R = (np.diff(reward_R, prepend=np.nan) != 0) | (np.diff(group_R, prepend=-1) != 0)
    sets: np.ndarray = np.cumsum(is_new_R) - 1
    return sets


def describe_transform(before: Columns, after: Columns, transform: RewardTransform) -> dict[str, Any]:
    """Return what a transform did: rewards it clipped, or prompts whose rewards tie and so have no closed-form Z."""
    assert before.reward_R is not None and after.reward_R is not None
    if transform == RewardTransform.none:
        return {}
    summary: dict[str, Any] = {"reward_transform": transform.value}
    if transform == RewardTransform.clipped:
        summary["clipped_rewards"] = int((before.reward_R != after.reward_R).sum())
    if transform == RewardTransform.quantile:
        order = np.lexsort((before.reward_R, before.group_R))
        group_R = before.group_R[order]
        set_R = sets_of_equals(before.reward_R[order], group_R)
        tied = len(np.unique(group_R[1:][np.diff(set_R) == 0]))
        summary["tied_prompts"] = tied
        if tied:
            summary["note"] = (
                f"{tied} of {len(before.row_ids)} prompts have responses with equal rewards, which share the middle of their ranks: "
                "Z = lambda (exp(1 / lambda) - 1) does not hold for them"
            )
    return summary
