"""What an objective is: weights from stored columns, and a loss of one value per response.

The weights are computed in float64 from the columns of the whole global batch, before anything is cut into forward passes,
so hardware cannot touch them. The loss is a sum over responses, divided by a count of the whole global batch.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]

# R responses of a global batch, G groups (prompts)


@dataclass(frozen=True)
class Columns:
    """Stored columns of one global batch. Responses of one prompt are neighbours and share a group number from 0."""

    row_ids: tuple[str, ...]  # G
    group_R: NDArray[np.int64]
    num_tokens_R: NDArray[np.int64]  # trained tokens, stop token included
    reward_R: FloatArray | None = None
    logp_ref_R: FloatArray | None = None  # nats, summed over trained tokens


class Objective(Protocol):
    """One way to train. `value_R` is a log-probability (policies) or a reward (reward models) of each response."""

    whole_groups: bool  # the loss of a response depends on the others of its prompt: keep them in one forward pass

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R, detached by nature: made of stored columns."""
        ...

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return what the sum over the global batch is divided by; `mean_tokens` is the data set's constant Tbar."""
        ...

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, group_R: Tensor) -> Tensor:
        """Return the loss of some responses of the batch, summed and not divided."""
        ...


def largest_of_sets(value_R: FloatArray, set_R: np.ndarray) -> FloatArray:
    """Return for each response the largest value of its set."""
    largest_S = np.full(int(set_R.max()) + 1, -np.inf)
    np.maximum.at(largest_S, set_R, value_R)
    largest: FloatArray = largest_S[set_R]
    return largest
