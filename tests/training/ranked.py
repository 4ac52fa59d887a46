"""Responses weighed by the rank of their rewards alone: an objective of one's own, as CONTRIBUTING.md says how to add one."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from training.config import ResponseRegime, StoredColumn
from training.data.selection import Select, select_distinct
from training.objectives.objective import Columns, Crosses, FloatArray, TrainConfig, WeightedLikelihood, check_column

# R responses of a global batch, G groups (prompts)


class RankedConfig(TrainConfig):
    """Each response weighs a share of the next better one of its prompt."""

    model_config = ConfigDict(title="Ranked")

    objective: Literal["ranked"] = Field("ranked", title="Objective")
    decay: float = Field(0.5, gt=0, le=1, title="Decay", description="That share, above 0; 1 is SFT on all responses.")

    @property
    def columns(self) -> tuple[StoredColumn, ...]:
        return (StoredColumn.rewards,)

    def choose_responses(self, regime: ResponseRegime) -> tuple[Select, int]:
        return select_distinct, 2

    def make(self, columns: Columns, *, regime: ResponseRegime, cross: Crosses) -> "Ranked":
        return Ranked(self.decay)


@dataclass(frozen=True)
class Ranked(WeightedLikelihood):
    """w_k = K d^(better_k) / sum_j d^(better_j), better_k: how many of the prompt's K responses have a higher reward."""

    decay: float

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R, which sums to K over each prompt."""
        reward_R = check_column(
            columns, columns.reward_R, "reward", objective="ranked", remedy="score the rewards again"
        )
        group_R = columns.group_R
        better_R = ((group_R[:, None] == group_R) & (reward_R[:, None] < reward_R)).sum(axis=1)
        share_R = self.decay**better_R
        weight_R: FloatArray = share_R * (np.bincount(group_R) / np.bincount(group_R, weights=share_R))[group_R]
        return weight_R

    def summary(self, stored: Columns, columns: Columns, weight_R: FloatArray) -> dict[str, Any]:
        """Return the largest weight."""
        return {"best_weight": float(weight_R.max())}
