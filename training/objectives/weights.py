"""Weights as softmax, and what they do in numbers: how many responses still count, how far the reward moved them, whether
they follow it."""

from collections.abc import Sequence

import numpy as np

from training.objectives.objective import Columns, FloatArray, largest_of_sets

# R responses of a global batch, G groups (prompts)

COLLAPSED_ESS = 1.1  # responses: below this one response has nearly all of a prompt's weight


def softmax_weights(reward_R: FloatArray, base_R: FloatArray, set_R: np.ndarray, *, lambda_: float) -> FloatArray:
    """Return w_R = n softmax(base + reward / lambda) within each set of n responses.

    The set's largest reward is taken off before the division: (r - max r) / lambda neither overflows for a tiny lambda nor moves when a
    constant is added to the rewards. So at least one score of a set is finite and the weights always sum to n.
    """
    with np.errstate(over="ignore"):
        score_R = base_R + (reward_R - largest_of_sets(reward_R, set_R)) / lambda_
    exp_R = np.exp(score_R - largest_of_sets(score_R, set_R))
    count_S = np.bincount(set_R)
    sum_S = np.bincount(set_R, weights=exp_R)
    weights: FloatArray = (count_S / sum_S)[set_R] * exp_R
    return weights


def check_weights(weight_R: FloatArray, *, step: int, row_ids: Sequence[str]) -> None:
    """Raise ValueError for weights of a step that cannot train anything: all zero, negative, NaN or infinite."""
    where = f"weights of step {step} (rows {', '.join(row_ids[:3])}{', ...' if len(row_ids) > 3 else ''})"
    if not np.isfinite(weight_R).all() or (weight_R < 0).any():
        raise ValueError(
            f"{where}: got NaN, infinite or negative ones; expected finite numbers >= 0; check the rewards"
        )
    if not weight_R.any():
        raise ValueError(f"{where}: all are zero; expected a sum of N; check rewards and lambda")


def describe_weights(columns: Columns, weight_R: FloatArray) -> dict[str, float]:
    """Return the figures of one global batch.

    ess: effective sample size (sum w)^2 / sum w^2 as a share of K, mean over prompts. ess_collapsed: share of prompts whose
    effective sample size is below 1.1 responses. ess_batch: that of the whole batch as a share of N, which tells of prompts that have all of its
    weight, as under in_batch. weight_max: the largest share of a prompt's weight on one response. kl_weights: KL(w || uniform) in nats, mean over prompts. reward_tilt: weighted minus plain
    mean reward, in its units. argmax_agreement: share of prompts whose heaviest response has the best reward.
    Prompts whose weights are all zero (possible under in_batch) count for none of the per-prompt figures.
    """
    group_R = columns.group_R
    sum_G = np.bincount(group_R, weights=weight_R)
    alive_G = sum_G > 0
    count_G = np.bincount(group_R)
    share_R = weight_R / np.where(alive_G, sum_G, 1.0)[group_R]
    square_G = np.bincount(group_R, weights=share_R**2)
    log_R = np.log(np.where(share_R > 0, share_R * count_G[group_R], 1.0))
    kl_G = np.bincount(group_R, weights=share_R * log_R)
    figures = {
        "ess": float((1.0 / (square_G[alive_G] * count_G[alive_G])).mean()),
        "ess_collapsed": float((1.0 / square_G[alive_G] < COLLAPSED_ESS).mean()),
        "ess_batch": float(weight_R.sum() ** 2 / (len(weight_R) * (weight_R**2).sum())),
        "weight_max": float(share_R.max()),
        "kl_weights": float(kl_G[alive_G].mean()),
    }
    if columns.reward_R is not None:
        figures["reward_tilt"] = float((weight_R * columns.reward_R).sum() / weight_R.sum() - columns.reward_R.mean())
        figures["argmax_agreement"] = float(argmax_agrees(columns, weight_R)[alive_G].mean())
    return figures


def argmax_agrees(columns: Columns, weight_R: FloatArray) -> np.ndarray:
    """Return for each group whether its heaviest response (the first of equals) has the group's best reward."""
    assert columns.reward_R is not None
    best_R = columns.reward_R == largest_of_sets(columns.reward_R, columns.group_R)
    heavy = np.flatnonzero(weight_R == largest_of_sets(weight_R, columns.group_R))
    first = heavy[np.unique(columns.group_R[heavy], return_index=True)[1]]
    agrees: np.ndarray = best_R[first]
    return agrees


def within_group_variance(value_R: FloatArray, group_R: np.ndarray) -> float:
    """Return the pooled variance within groups, unbiased; 0 where no group has members that differ.

    A group of equal values counts as 0 exactly: the rounding of its mean (that of three times 0.1 is not 0.1) is no spread, and
    lambda must not be counted in it.
    """
    count_G = np.bincount(group_R)
    mean_G = np.bincount(group_R, weights=value_R) / count_G
    differs_R = largest_of_sets(value_R, group_R) > -largest_of_sets(-value_R, group_R)
    deviation_R = np.where(differs_R, value_R - mean_G[group_R], 0.0)
    degrees = int((count_G - 1).sum())
    return float((deviation_R**2).sum() / degrees) if degrees else 0.0
