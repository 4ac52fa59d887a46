"""Bradley-Terry: the chosen response is to have the larger reward. P(c over r) = sigmoid(r_c - r_r)."""

from typing import TYPE_CHECKING

import numpy as np

from training.objectives.objective import Columns, FloatArray, Objective

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(Objective):
    """mean over prompts of the mean over their rejected responses of - log sigmoid(r_chosen - r_rejected).

    The first response of a group is the chosen one.
    """

    whole_groups = True

    def weigh(self, columns: Columns) -> FloatArray:
        """Return the weights of pairs: 0 for the chosen response of a group, 1 / (K - 1) for each other."""
        return pair_weights(columns)

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return the number of prompts."""
        return float(len(columns.row_ids))

    def loss_sum(self, value_R: "Tensor", weight_R: "Tensor", columns: Columns) -> "Tensor":
        """Return the loss summed over the groups that these responses make up; groups come whole."""
        from torch.nn.functional import logsigmoid

        return -(weight_R * logsigmoid(margins(value_R, columns.group_R))).sum()


def pair_weights(columns: Columns) -> FloatArray:
    """Return 0 for the first response of a group, to which the others are compared, and 1 / (K - 1) for each other."""
    count_G = np.bincount(columns.group_R)
    if count_G.min() < 2:
        row_id = columns.row_ids[int(count_G.argmin())]
        raise ValueError(f"row {row_id}: a single response; expected a chosen and at least one rejected; drop the row")
    weight_R: FloatArray = 1.0 / (count_G[columns.group_R] - 1)
    weight_R[first_of_groups(columns.group_R)] = 0.0
    return weight_R


def margins(value_R: "Tensor", group_R: np.ndarray) -> "Tensor":
    """Return for each response by how much the first of its group exceeds it; groups come whole, numbered from 0."""
    from training.tree import send

    first_R = send(first_of_groups(group_R)[group_R], device=value_R.device)
    return value_R[first_R] - value_R


def first_of_groups(group_R: np.ndarray) -> np.ndarray:
    """Return the index of each group's first response."""
    return np.unique(group_R, return_index=True)[1]
