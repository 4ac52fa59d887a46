"""DPO, direct preference optimisation (Rafailov et al., arXiv 2305.18290): the chosen response's implicit reward
beta (log pi - log pi_ref) is to exceed that of each rejected one.

Its optimum under Bradley-Terry preferences is VAR's pi*, reached through comparisons and without a reward model. log pi_ref is a
stored column: no reference model is in memory.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from training.config import ResponseRegime, StoredColumn
from training.data.selection import Select, select_preferred_first
from training.objectives.bradley_terry import first_of_groups, margins, pair_weights
from training.objectives.objective import Columns, Crosses, FloatArray, Objective, TrainConfig, check_column

if TYPE_CHECKING:
    from torch import Tensor

# R responses of a global batch, G groups (prompts)


class DpoConfig(TrainConfig):
    """Direct preference optimisation, arXiv 2305.18290: preferred against each other response, with stored reference log-probabilities."""

    model_config = ConfigDict(title="DPO")
    whole_groups: ClassVar[bool] = True

    objective: Literal["dpo"] = Field("dpo", title="Objective")
    beta: float = Field(
        0.1,
        gt=0,
        title="Beta",
        description="Strength of the pull towards the reference, above 0: small follows the preferences, large the reference.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        title="Label smoothing",
        description="Share of preferences taken to be the wrong way round, from 0 to below 0.5.",
    )

    @property
    def columns(self) -> tuple[StoredColumn, ...]:
        return (StoredColumn.reference,)

    def choose_responses(self, regime: ResponseRegime) -> tuple[Select, int]:
        return partial(select_preferred_first, distinct=regime == ResponseRegime.support), 2

    def make(self, columns: Columns, *, regime: ResponseRegime, cross: Crosses) -> "Dpo":
        return Dpo(beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Dpo(Objective):
    """mean over prompts of the mean over their rejected responses of the sigmoid loss (equation 7)

        - (1 - e) log sigmoid(d) - e log sigmoid(-d),    d = beta ((log pi_c - log pi_ref_c) - (log pi_r - log pi_ref_r))

    with e the label smoothing: the share of preferences taken to be the wrong way round. The first response of a group is the
    chosen one.
    """

    beta: float
    label_smoothing: float = 0.0

    whole_groups = DpoConfig.whole_groups

    def weigh(self, columns: Columns) -> FloatArray:
        """Return 0 for the chosen response of a group, 1 / (K - 1) for each other. ValueError where log pi_ref is missing."""
        check_reference(columns)
        return pair_weights(columns)

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return the number of prompts."""
        return float(len(columns.row_ids))

    def loss_sum(self, value_R: "Tensor", weight_R: "Tensor", columns: Columns) -> "Tensor":
        """Return the loss summed over the groups that these responses make up; groups come whole."""
        from torch.nn.functional import logsigmoid

        from training.tree import send

        logp_ref_R = send(check_reference(columns), device=value_R.device)
        margin_R = margins(self.beta * (value_R - logp_ref_R), columns.group_R)
        loss_R = -(1 - self.label_smoothing) * logsigmoid(margin_R) - self.label_smoothing * logsigmoid(-margin_R)
        return (weight_R * loss_R).sum()

    def figures(self, value_R: FloatArray, columns: Columns) -> dict[str, float]:
        """Return implicit rewards of chosen and rejected, their margin, and the share of comparisons won (ties count half)."""
        reward_R = self.beta * (value_R - check_reference(columns))
        weight_R = pair_weights(columns)
        chosen_R = reward_R[first_of_groups(columns.group_R)][columns.group_R]
        won_R = np.heaviside(chosen_R - reward_R, 0.5)
        sums = {"chosen": chosen_R, "rejected": reward_R, "margins": chosen_R - reward_R, "accuracies": won_R}
        return {f"rewards/{name}": float((weight_R * value).sum()) for name, value in sums.items()}


def check_reference(columns: Columns) -> FloatArray:
    """Return log pi_ref; ValueError, with the rows, where it is missing, NaN or infinite."""
    return check_column(
        columns, columns.logp_ref_R, "logp_ref", objective="dpo", remedy="score the rows under the reference again"
    )
