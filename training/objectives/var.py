"""VAR, Variational Alignment with Re-weighting (arXiv 2502.11026): SFT weighted towards pi* = pi_ref exp(r / lambda) / Z.

Derivation, regimes and what is known about each: docs/var.md. For the responses y_k of a prompt, with l_k = log pi_ref(y_k|x)
and reward r_k, the score is

    support:          s_k = f(l_k) + r_k / lambda       the responses are a fixed set
    from_reference:   s_k = r_k / lambda                the responses were sampled from pi_ref

and the weights are w = N softmax(s) over the chosen set: all K responses of a prompt, or all of a global batch.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from training.config import LambdaUnit, Normaliser, ReferenceFactor, ResponseRegime, VarConfig
from training.objectives.objective import Columns, FloatArray, Objective, check_column, largest_of_sets
from training.objectives.sft import weighted_nll

# R responses of a global batch, G groups (prompts)


@dataclass(frozen=True)
class Var(Objective):
    """The weighted SFT loss sum_i w_i sum_t nll_it / (N * Tbar). `lambda_` is in units of the stored reward."""

    lambda_: float
    regime: ResponseRegime
    normaliser: Normaliser
    reference_factor: ReferenceFactor

    whole_groups = False

    def __post_init__(self) -> None:
        check_lambda(self.lambda_)
        check_regime(self.regime, self.reference_factor)

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R >= 0 in float64, sum N over the global batch."""
        reward_R = check_rewards(columns)
        set_R = columns.group_R if self.normaliser == Normaliser.per_prompt else np.zeros_like(columns.group_R)
        if self.normaliser == Normaliser.per_prompt:
            check_groups(columns)
        factor_R = reference_factor(columns, self) if self.regime == ResponseRegime.support else 0.0
        return softmax_weights(reward_R, factor_R, set_R, lambda_=self.lambda_)

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return N * Tbar: the loss reads as nats per token."""
        return len(columns.group_R) * mean_tokens

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, columns: Columns) -> Tensor:
        """Return the negative log-likelihood, weighted and summed."""
        return weighted_nll(value_R, weight_R)


def softmax_weights(
    reward_R: FloatArray, factor_R: FloatArray | float, set_R: np.ndarray, *, lambda_: float
) -> FloatArray:
    """Return w_R = n softmax(factor + reward / lambda) within each set of n responses.

    The set's largest reward is taken off before the division: (r - max r) / lambda neither overflows for a tiny lambda nor moves when a
    constant is added to the rewards. So at least one score of a set is finite and the weights always sum to n.
    """
    with np.errstate(over="ignore"):
        score_R = factor_R + (reward_R - largest_of_sets(reward_R, set_R)) / lambda_
    exp_R = np.exp(score_R - largest_of_sets(score_R, set_R))
    count_S = np.bincount(set_R)
    sum_S = np.bincount(set_R, weights=exp_R)
    weights: FloatArray = (count_S / sum_S)[set_R] * exp_R
    return weights


def reference_factor(columns: Columns, objective: Var) -> FloatArray:
    """Return f(l): the summed log-probability, its mean over trained tokens, or zeros. Checked only where it is used."""
    if objective.reference_factor == ReferenceFactor.none:
        return np.zeros(len(columns.group_R))
    logp_ref_R = check_column(
        columns, columns.logp_ref_R, "logp_ref", objective="var", remedy="score the reference again"
    )
    if objective.reference_factor == ReferenceFactor.mean:
        mean: FloatArray = logp_ref_R / columns.num_tokens_R
        return mean
    return logp_ref_R


def lambda_in_reward_units(config: VarConfig, columns: Columns) -> float:
    """Return lambda as the objective divides by it; `columns` are those of the whole train split.

    `reward_std` counts in within-prompt standard deviations: sqrt(sum_g sum_k (r_gk - mean_g)^2 / sum_g (K_g - 1)).
    """
    check_lambda(config.lambda_)
    if config.lambda_unit == LambdaUnit.reward:
        return config.lambda_
    variance = within_group_variance(check_rewards(columns), columns.group_R)
    if not variance > 0:
        raise ValueError(
            "lambda_unit reward_std: within every prompt all rewards are equal, so there is no standard deviation to count in; "
            "expected rewards that differ; check the scorer, or set lambda_unit to reward"
        )
    return config.lambda_ * math.sqrt(variance)


def within_group_variance(value_R: FloatArray, group_R: np.ndarray) -> float:
    """Return the pooled variance within groups, unbiased; 0 where every group has a single member."""
    count_G = np.bincount(group_R)
    mean_G = np.bincount(group_R, weights=value_R) / count_G
    degrees = int((count_G - 1).sum())
    return float(((value_R - mean_G[group_R]) ** 2).sum() / degrees) if degrees else 0.0


def check_lambda(lambda_: float) -> None:
    """Raise ValueError unless lambda is a finite number above 0."""
    if not (math.isfinite(lambda_) and lambda_ > 0):
        raise ValueError(
            f"lambda: got {lambda_}, expected a finite number above 0; towards 0 the best response alone counts, "
            "towards infinity the reference alone"
        )


def check_regime(regime: ResponseRegime, factor: ReferenceFactor) -> None:
    """Raise ValueError for a regime whose weights cannot be computed, or a factor that is wrong in it."""
    if regime == ResponseRegime.from_behaviour:
        raise ValueError(
            "responses from_behaviour: its weight needs log q(y|x) of the policy that sampled the responses, and the rows store "
            "none; expected support or from_reference; ingest the responses as support if they are a fixed set"
        )
    if regime == ResponseRegime.from_reference and factor == ReferenceFactor.mean:
        raise ValueError(
            "reference_factor mean: not defined for responses from_reference, whose weights hold no reference factor; "
            "set it to none or sum (both mean: already in the sampling)"
        )


def check_rewards(columns: Columns) -> FloatArray:
    """Return the rewards; ValueError, with the rows, for missing, NaN or infinite ones."""
    return check_column(columns, columns.reward_R, "reward", objective="var", remedy="score the rewards again")


def check_groups(columns: Columns) -> None:
    """Raise ValueError for a group of one: its only weight is 1 whatever the reward, so it would teach plain SFT."""
    count_G = np.bincount(columns.group_R)
    lonely = [columns.row_ids[g] for g in np.flatnonzero(count_G == 1)]
    if lonely:
        raise ValueError(
            f"normaliser per_prompt: {len(lonely)} of {len(count_G)} rows have a single response (first: {', '.join(lonely[:3])}); "
            "expected at least 2, since the weight of a group of one ignores its reward; drop the rows or use in_batch"
        )
