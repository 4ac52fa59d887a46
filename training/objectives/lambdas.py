"""Lambda in reward units: given so, counted in standard deviations of the reward, or set by an effective sample size.

The effective sample size (ESS) of a prompt's weights is (sum w)^2 / sum w^2; here it is a share of K, and the mean over prompts.
"""

import math
from collections.abc import Callable
from enum import StrEnum
from itertools import pairwise

import numpy as np

from training.objectives.objective import FloatArray
from training.objectives.weights import softmax_weights, within_group_variance

# R responses of the train split, G groups (prompts)

DECADES = 6  # lambda is looked for up to so many powers of ten from the standard deviation, both ways
POINTS_PER_DECADE = 20
MOST_TIES = 240  # of the lambdas at which two responses tie, where an effective sample size may peak between those
ESS_TOLERANCE = 1e-6


class LambdaUnit(StrEnum):
    """What lambda is measured in."""

    reward = "reward"
    reward_std = "reward_std"
    ess_target = "ess_target"


def resolve_lambda(
    number: float, unit: LambdaUnit, *, reward_R: FloatArray, base_R: FloatArray, group_R: np.ndarray
) -> float:
    """Return lambda as the objective divides by it. `base_R` is the score without the reward, in nats.

    `reward_std` counts in within-prompt standard deviations: sqrt(sum_g sum_k (r_gk - mean_g)^2 / sum_g (K_g - 1)).
    `ess_target` is the lambda at which the prompts' mean ESS is `number`, a share of K.
    """
    check_lambda(number)
    if unit == LambdaUnit.reward:
        return number
    variance = within_group_variance(reward_R, group_R)
    if not variance > 0:
        raise ValueError(
            f"lambda_unit {unit}: within every prompt all rewards are equal, so there is no scale to count in; "
            "expected rewards that differ; check the scorer, or set lambda_unit to reward"
        )
    if not math.isfinite(variance):
        raise ValueError(
            f"lambda_unit {unit}: rewards of up to {np.abs(reward_R).max():.3g} have no variance that can be counted in; expected rewards below "
            "1e150; scale them, or set lambda_unit to reward"
        )
    scale = math.sqrt(variance)
    if unit == LambdaUnit.reward_std:
        return number * scale
    return scale * find_ess(number, reward_R=reward_R / scale, base_R=base_R, group_R=group_R)


def find_ess(target: float, *, reward_R: FloatArray, base_R: FloatArray, group_R: np.ndarray) -> float:
    """Return the smallest lambda whose mean ESS is `target`; ValueError with the attainable range where there is none.

    Without a reference factor the ESS grows with lambda, and its ends bracket the target. With one it need not (towards 0
    the best response is left alone, towards infinity the likeliest), so lambda is scanned, where responses tie too: against a long
    response the reference outweighs the reward by so much that they share the weight nowhere else. Of several that fit the
    smallest is taken, where the reward weighs most.
    """
    from scipy.optimize import brentq

    def miss(log_lambda: float) -> float:
        return mean_ess(10.0**log_lambda, reward_R=reward_R, base_R=base_R, group_R=group_R) - target

    is_monotone = not base_R.any()
    log_lambdas = np.linspace(-DECADES, DECADES, 2 if is_monotone else 2 * DECADES * POINTS_PER_DECADE + 1)
    if not is_monotone:
        log_lambdas = np.union1d(log_lambdas, find_ties(reward_R=reward_R, base_R=base_R, group_R=group_R))
    misses = np.array([miss(log_lambda) for log_lambda in log_lambdas])
    if not is_monotone and (misses.max() < 0 or misses.min() > 0):  # perhaps it is reached beside the furthest point
        log_lambdas = np.union1d(log_lambdas, find_peaks(miss, log_lambdas, misses))
        misses = np.array([miss(log_lambda) for log_lambda in log_lambdas])
    near = np.flatnonzero(np.abs(misses) <= ESS_TOLERANCE)
    crossed = np.flatnonzero(np.sign(misses[:-1]) * np.sign(misses[1:]) < 0)
    if len(near) == len(crossed) == 0:
        raise ValueError(
            f"lambda_unit ess_target: got {target:g}, expected a share of K between {misses.min() + target:.4g} and "
            f"{misses.max() + target:.4g}: the effective sample sizes that these rewards and this reference factor can have; "
            "set lambda_ within that range, or count lambda in reward_std"
        )
    if len(near) and (not len(crossed) or near[0] <= crossed[0]):
        return float(10.0 ** log_lambdas[near[0]])
    return float(10.0 ** brentq(miss, log_lambdas[crossed[0]], log_lambdas[crossed[0] + 1], xtol=1e-12))


def find_peaks(miss: Callable[[float], float], log_lambdas: FloatArray, misses: FloatArray) -> list[float]:
    """Return where the misses, all of one sign, come nearest to 0 or cross it on either side of the point that is nearest."""
    from scipy.optimize import minimize_scalar

    nearest, sign = int(np.argmin(np.abs(misses))), np.sign(misses[0])
    sides = list(pairwise(log_lambdas))[max(0, nearest - 1) : nearest + 1]
    found = (
        minimize_scalar(lambda at: sign * miss(at), bounds=side, method="bounded", options={"xatol": 1e-9})
        for side in sides
    )
    return [float(each.x) for each in found]


def find_ties(*, reward_R: FloatArray, base_R: FloatArray, group_R: np.ndarray) -> FloatArray:
    """Return the logarithms to base 10 of lambdas at which two responses of a prompt have the same score, MOST_TIES at most."""
    found = []
    for apart in range(1, int(np.bincount(group_R).max())):
        same = group_R[apart:] == group_R[:-apart]
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.log10((reward_R[apart:] - reward_R[:-apart]) / (base_R[:-apart] - base_R[apart:]))[same])
    ties = np.unique(np.concatenate(found)) if found else np.zeros(0)
    ties = ties[np.abs(ties) < DECADES]  # NaN is not
    chosen: FloatArray = ties[np.linspace(0, len(ties) - 1, min(len(ties), MOST_TIES)).astype(int)]
    return chosen


def mean_ess(lambda_: float, *, reward_R: FloatArray, base_R: FloatArray, group_R: np.ndarray) -> float:
    """Return the ESS of softmax(base + reward / lambda) within each prompt as a share of K, mean over prompts."""
    weight_R = softmax_weights(reward_R, base_R, group_R, lambda_=lambda_)
    # A prompt's weights sum to K, so its share (sum w)^2 / (K sum w^2) is K / sum w^2.
    return float((np.bincount(group_R) / np.bincount(group_R, weights=weight_R**2)).mean())


def check_lambda(lambda_: float) -> None:
    """Raise ValueError unless lambda is a finite number above 0."""
    if not (math.isfinite(lambda_) and lambda_ > 0):
        raise ValueError(
            f"lambda: got {lambda_}, expected a finite number above 0; towards 0 the best response alone counts, "
            "towards infinity the reference alone"
        )
