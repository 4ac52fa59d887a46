"""VAR, Variational Alignment with Re-weighting (arXiv 2502.11026): SFT weighted towards pi* = pi_ref exp(r / lambda) / Z.

Derivation, regimes and what is known about each: docs/var.md. For the responses y_k of a prompt, with l_k = log pi_ref(y_k|x)
and reward r_k, the score is

    support:          s_k = f(l_k) + r_k / lambda       the responses are a fixed set
    from_reference:   s_k = r_k / lambda                the responses were sampled from pi_ref
    from_behaviour:   s_k = l_k + r_k / lambda - log q_k    they were sampled from q, whose log-probabilities are stored

and the weights are w = N softmax(s) over the chosen set: all K responses of a prompt, or all of a global batch; or each prompt's Z
runs over the whole batch (cross_batch).
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from training.config import ResponseRegime, StoredColumn
from training.data.selection import Select, select_all, select_distinct
from training.objectives.cross import cross_batch_weights
from training.objectives.lambdas import LambdaUnit, check_lambda, resolve_lambda
from training.objectives.objective import Columns, Crosses, FloatArray, TrainConfig, WeightedLikelihood, check_column
from training.objectives.transforms import RewardTransform, describe_transform, transform_rewards
from training.objectives.weights import describe_weights, softmax_weights, within_group_variance

# R responses of a global batch, G groups (prompts)

MIN_ARGMAX_AGREEMENT = 0.6


class Normaliser(StrEnum):
    """Over which set the weights are a softmax."""

    per_prompt = "per_prompt"
    in_batch = "in_batch"
    cross_batch = "cross_batch"


class ReferenceFactor(StrEnum):
    """f(l) in the score f(log pi_ref) + r / lambda of the `support` regime."""

    sum = "sum"
    mean = "mean"
    none = "none"


class VarConfig(TrainConfig):
    """Variational Alignment with Re-weighting, arXiv 2502.11026: SFT weighted by pi_ref exp(r / lambda)."""

    model_config = ConfigDict(title="VAR")

    objective: Literal["var"] = Field("var", title="Objective")
    lambda_: float = Field(
        1.0,
        gt=0,
        title="Lambda",
        description="Temperature of the reward, above 0: small follows the reward, large the reference. Of ess_target: a share, up to 1.",
    )
    lambda_unit: LambdaUnit = Field(
        LambdaUnit.reward_std,
        title="Unit of lambda",
        description="reward: as the scorer gives it. reward_std: in within-prompt standard deviations of the reward. ess_target: lambda is found so that the effective sample size is this share of K.",
    )
    normaliser: Normaliser = Field(
        Normaliser.per_prompt,
        title="Normaliser",
        description="per_prompt: over the K responses of a prompt. in_batch: over the global batch. cross_batch: over all responses of the batch put under each prompt; costs the square of the batch.",
    )
    reference_factor: ReferenceFactor = Field(
        title="Reference factor",
        description="sum: exact. mean and none: practical and biased (docs/var.md). No default: each recipe gives its reason.",
    )

    reward_transform: RewardTransform = Field(
        RewardTransform.none,
        title="Reward transform",
        description="none. centred: minus the prompt's mean. clipped: to the bounds below. quantile: rank under the reference among the prompt's responses, between 0 and 1.",
    )
    clip_low: float | None = Field(
        None, title="Lower clip bound", description="Of clipped, in reward units: smaller rewards become this one."
    )
    clip_high: float | None = Field(
        None,
        title="Upper clip bound",
        description="Of clipped, in reward units, above the lower one: larger rewards become this one.",
    )

    @property
    def columns(self) -> tuple[StoredColumn, ...]:
        own = (StoredColumn.rewards, StoredColumn.reference)
        return (*own, StoredColumn.cross) if self.normaliser == Normaliser.cross_batch else own

    @model_validator(mode="after")
    def _check(self) -> "VarConfig":
        bounds = (self.clip_low, self.clip_high)
        if self.reward_transform == RewardTransform.clipped:
            if self.clip_low is None or self.clip_high is None or not self.clip_low < self.clip_high:
                raise ValueError(
                    f"reward_transform clipped: got the bounds {bounds}, expected clip_low below clip_high; set both"
                )
        elif bounds != (None, None):
            raise ValueError(
                f"clip_low, clip_high: got {bounds} with reward_transform {self.reward_transform}, which clips nothing; "
                "set reward_transform to clipped, or leave the bounds empty"
            )
        if self.lambda_unit == LambdaUnit.ess_target and self.lambda_ > 1:
            raise ValueError(
                f"lambda_: got {self.lambda_:g} as ess_target, expected a share of K above 0 and up to 1; "
                "lower it, or count lambda in reward or reward_std"
            )
        if self.normaliser == Normaliser.cross_batch and (
            self.reward_transform != RewardTransform.none or self.lambda_unit == LambdaUnit.ess_target
        ):
            raise ValueError(
                f"normaliser cross_batch: got reward_transform {self.reward_transform} and lambda_unit {self.lambda_unit}, both "
                "of which look at a prompt's own responses alone; set them to none, and to reward or reward_std"
            )
        return self

    def choose_responses(self, regime: ResponseRegime) -> tuple[Select, int]:
        """A fixed set holds each response once; among samples a repetition is evidence."""
        return (select_distinct, 2) if regime == ResponseRegime.support else (select_all, 1)

    def make(self, columns: Columns, *, regime: ResponseRegime, cross: Crosses) -> "Var":
        """The train split is what lambda may be counted in."""
        var = Var(
            lambda_=self.lambda_,
            regime=regime,
            normaliser=self.normaliser,
            reference_factor=self.reference_factor,
            reward_transform=self.reward_transform,
            clip=(self.clip_low, self.clip_high),
            cross=cross,
        )
        lambda_ = resolve_lambda(
            self.lambda_,
            self.lambda_unit,
            reward_R=check_rewards(var.transform(columns)),
            base_R=var.base(columns),
            group_R=columns.group_R,
        )
        return replace(var, lambda_=lambda_)


@dataclass(frozen=True)
class Var(WeightedLikelihood):
    """The weighted likelihood towards pi*. `lambda_` is in units of the reward."""

    lambda_: float
    regime: ResponseRegime
    normaliser: Normaliser
    reference_factor: ReferenceFactor
    reward_transform: RewardTransform = RewardTransform.none
    clip: tuple[float | None, float | None] = (None, None)
    cross: Crosses = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_lambda(self.lambda_)
        check_regime(self.regime, self.reference_factor, self.normaliser)

    def transform(self, columns: Columns) -> Columns:
        """Return the columns with the rewards that are weighed."""
        check_rewards(columns)
        return transform_rewards(columns, self.reward_transform, clip=self.clip, base_R=self.base(columns))

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

    def summary(self, stored: Columns, columns: Columns, weight_R: FloatArray) -> dict[str, Any]:
        """Return lambda, what reward and reference contribute, what became of the rewards, and a warning where they are not heard."""
        reward_R = check_rewards(columns)
        agreement = describe_weights(columns, weight_R)["argmax_agreement"]  # of prompts that have some weight
        told: dict[str, Any] = {"lambda": self.lambda_, "regime": self.regime.value, "argmax_agreement": agreement}
        with np.errstate(over="ignore"):
            variance = np.float64(within_group_variance(reward_R, columns.group_R)) / self.lambda_ / self.lambda_
        if np.isfinite(variance):  # of a lambda that leaves the best response alone it is no number
            told["variance_reward_over_lambda"] = float(variance)
        if self.regime == ResponseRegime.support and self.reference_factor != ReferenceFactor.none:
            told["variance_reference_factor"] = within_group_variance(self.base(columns), columns.group_R)
        if agreement < MIN_ARGMAX_AGREEMENT:
            told["warning"] = (
                f"only {agreement:.0%} of the prompts give their heaviest weight to the response with the best reward: the reference "
                "factor outweighs the reward; lower lambda, or choose reference_factor mean or none"
            )
        return told | describe_transform(stored, self.transform(stored), self.reward_transform)


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
