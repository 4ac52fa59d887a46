"""Supervised fine-tuning: every selected response with weight 1.

Which responses are there (chosen only, or all) is a selection of data, made before; the loss is VAR's with unit weights.
"""

from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field

from training.config import ResponseRegime
from training.data.selection import Select, select_all, select_chosen
from training.objectives.objective import Columns, Crosses, FloatArray, TrainConfig, WeightedLikelihood


class SftConfig(TrainConfig):
    """Unweighted supervised fine-tuning: the baseline."""

    model_config = ConfigDict(title="SFT")

    objective: Literal["sft"] = Field("sft", title="Objective")
    responses: Literal["chosen", "all"] = Field(
        "chosen", title="Responses", description="chosen: the preferred response. all: every response with unit weight."
    )

    def choose_responses(self, regime: ResponseRegime) -> tuple[Select, int]:
        return select_chosen if self.responses == "chosen" else select_all, 1

    def make(self, columns: Columns, *, regime: ResponseRegime, cross: Crosses) -> "Sft":
        return Sft()


class Sft(WeightedLikelihood):
    """sum_i sum_t nll_it / (N * Tbar) over N responses."""

    def weigh(self, columns: Columns) -> FloatArray:
        """Return ones."""
        return np.ones(len(columns.group_R))
