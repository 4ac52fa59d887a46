"""Supervised fine-tuning: every selected response with weight 1.

Which responses are there (chosen only, or all) is a selection of data, made before; the loss is VAR's with unit weights.
"""

import numpy as np
from torch import Tensor

from training.objectives.objective import Columns, FloatArray, Objective


class Sft(Objective):
    """sum_i sum_t nll_it / (N * Tbar) over N responses."""

    whole_groups = False

    def weigh(self, columns: Columns) -> FloatArray:
        """Return ones."""
        return np.ones(len(columns.group_R))

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return N * Tbar: the loss reads as nats per token."""
        return len(columns.group_R) * mean_tokens

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, columns: Columns) -> Tensor:
        """Return the negative log-likelihood, weighted and summed."""
        return weighted_nll(value_R, weight_R)


def weighted_nll(logp_R: Tensor, weight_R: Tensor) -> Tensor:
    """Return - sum_i w_i log pi(y_i | x_i), never divided by a response's own length: that would change the optimum."""
    return -(weight_R * logp_R).sum()
