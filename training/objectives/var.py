"""VAR, Variational Alignment with Re-weighting (arXiv 2502.11026): SFT weighted towards pi* = pi_ref exp(r / lambda) / Z.

Derivation, regimes and what is known about each: docs/var.md. For the responses y_k of a prompt, with l_k = log pi_ref(y_k|x)
and reward r_k, the score is

    support:          s_k = f(l_k) + r_k / lambda       the responses are a fixed set
    from_reference:   s_k = r_k / lambda                the responses were sampled from pi_ref
    from_behaviour:   s_k = l_k + r_k / lambda - log q_k    they were sampled from q, whose log-probabilities are stored

and the weights are w = N softmax(s) over the chosen set: all K responses of a prompt, or all of a global batch; or each prompt's Z
runs over the whole batch (cross_batch).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from training.config import Normaliser, ReferenceFactor, ResponseRegime, VarConfig
from training.objectives.cross import Cross, cross_batch_weights
from training.objectives.lambdas import check_lambda, resolve_lambda
from training.objectives.objective import Columns, FloatArray, Objective, check_column
from training.objectives.sft import weighted_nll
from training.objectives.transforms import transform_rewards
from training.objectives.weights import softmax_weights

# R responses of a global batch, G groups (prompts)


@dataclass(frozen=True)
class Var(Objective):
    """The weighted SFT loss sum_i w_i sum_t nll_it / (N * Tbar). `lambda_` is in units of the reward."""

    lambda_: float
    regime: ResponseRegime
    normaliser: Normaliser
    reference_factor: ReferenceFactor
    cross: Mapping[tuple[str, ...], Cross] = field(default_factory=dict)  # of cross_batch: by the row ids of a batch

    whole_groups = False

    def __post_init__(self) -> None:
        check_lambda(self.lambda_)
        check_regime(self.regime, self.reference_factor, self.normaliser)

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R >= 0 in float64, sum N over the global batch."""
        if self.normaliser == Normaliser.cross_batch:
            return self.weigh_cross(columns)
        reward_R = check_rewards(columns)
        set_R = columns.group_R if self.normaliser == Normaliser.per_prompt else np.zeros_like(columns.group_R)
        if self.normaliser == Normaliser.per_prompt:
            check_groups(columns)
        return softmax_weights(reward_R, self.base(columns), set_R, lambda_=self.lambda_)

    def weigh_cross(self, columns: Columns) -> FloatArray:
        """Return weight_R from the matrices of this batch."""
        cross = self.cross[columns.row_ids]
        base_GN = {
            ReferenceFactor.sum: cross.logp_ref_GN,
            ReferenceFactor.mean: cross.logp_ref_GN / columns.num_tokens_R,
            ReferenceFactor.none: np.zeros_like(cross.logp_ref_GN),
        }[self.reference_factor]
        return cross_batch_weights(cross.reward_GN, base_GN, columns.group_R, lambda_=self.lambda_)

    def base(self, columns: Columns) -> FloatArray:
        """Return the score without the reward, in nats: f(l) for a fixed set, 0 for samples of pi_ref, else l - log q."""
        if self.regime == ResponseRegime.support:
            return reference_factor(columns, self.reference_factor)
        if self.regime == ResponseRegime.from_reference:
            return np.zeros(len(columns.group_R))
        logq_R = check_column(
            columns, columns.logq_R, "logq", objective="var", remedy="ingest the rows with their log q"
        )
        ratio_R: FloatArray = reference_factor(columns, ReferenceFactor.sum) - logq_R
        return ratio_R

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return N * Tbar: the loss reads as nats per token."""
        return len(columns.group_R) * mean_tokens

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, columns: Columns) -> Tensor:
        """Return the negative log-likelihood, weighted and summed."""
        return weighted_nll(value_R, weight_R)


def make_var(
    config: VarConfig,
    *,
    regime: ResponseRegime,
    columns: Columns,
    cross: Mapping[tuple[str, ...], Cross] | None = None,
) -> tuple[Var, Columns]:
    """Return the objective of a config, and the columns with the rewards that it weighs.

    `columns` are those of the whole train split: what rewards are transformed over and lambda may be counted in.
    """
    var = Var(
        lambda_=config.lambda_,
        regime=regime,
        normaliser=config.normaliser,
        reference_factor=config.reference_factor,
        cross=cross or {},
    )
    check_rewards(columns)
    base_R = var.base(columns)
    transformed = transform_rewards(columns, config, base_R=base_R)
    lambda_ = resolve_lambda(
        config.lambda_,
        config.lambda_unit,
        reward_R=check_rewards(transformed),
        base_R=base_R,
        group_R=columns.group_R,
    )
    return replace(var, lambda_=lambda_), transformed


def reference_factor(columns: Columns, factor: ReferenceFactor) -> FloatArray:
    """Return f(l): the summed log-probability, its mean over trained tokens, or zeros. Checked only where it is used."""
    if factor == ReferenceFactor.none:
        return np.zeros(len(columns.group_R))
    logp_ref_R = check_column(
        columns, columns.logp_ref_R, "logp_ref", objective="var", remedy="score the reference again"
    )
    if factor == ReferenceFactor.mean:
        mean: FloatArray = logp_ref_R / columns.num_tokens_R
        return mean
    return logp_ref_R


def check_regime(regime: ResponseRegime, factor: ReferenceFactor, normaliser: Normaliser) -> None:
    """Raise ValueError for a reference factor or a normaliser that a sampled regime does not have."""
    if regime != ResponseRegime.support and normaliser == Normaliser.cross_batch:
        raise ValueError(
            f"normaliser cross_batch: not defined for responses {regime}: what was sampled for one prompt is no sample of "
            "another's answers; set it to per_prompt or in_batch"
        )
    if regime == ResponseRegime.from_behaviour and factor != ReferenceFactor.sum:
        raise ValueError(
            f"reference_factor {factor}: not defined for responses from_behaviour, whose importance weight holds log pi_ref "
            "as a whole; set it to sum"
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
