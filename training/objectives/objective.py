"""What an objective is: weights from stored columns, and a loss of one value per response.

The weights are computed in float64 from the columns of the whole global batch, before anything is cut into forward passes,
so hardware cannot touch them. The loss is a sum over responses, divided by a count of the whole global batch.
"""

from collections.abc import Sequence
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
    logq_R: FloatArray | None = None  # likewise, under the policy that sampled the responses
    preferred_R: FloatArray | None = (
        None  # 1 for the preferred response of a prompt, 0 for its others, NaN where nobody said
    )

    def take(self, members: Sequence[int]) -> "Columns":
        """Return the columns of some responses, in the order of `members`."""
        chosen = list(members)
        groups, group_R = np.unique(self.group_R[chosen], return_inverse=True)
        return Columns(
            row_ids=tuple(self.row_ids[group] for group in groups),
            group_R=group_R,
            num_tokens_R=self.num_tokens_R[chosen],
            reward_R=None if self.reward_R is None else self.reward_R[chosen],
            logp_ref_R=None if self.logp_ref_R is None else self.logp_ref_R[chosen],
            logq_R=None if self.logq_R is None else self.logq_R[chosen],
            preferred_R=None if self.preferred_R is None else self.preferred_R[chosen],
        )


class Objective(Protocol):
    """One way to train. `value_R` is a log-probability (policies) or a reward (reward models) of each response.

    Pure functions of values, weights and stored columns; classes inherit from it to get `figures`.
    """

    whole_groups: bool  # the loss of a response depends on the others of its prompt: keep them in one forward pass

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R, detached by nature: made of stored columns."""
        ...

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return what the sum over the global batch is divided by; `mean_tokens` is the data set's constant Tbar."""
        ...

    def loss_sum(self, value_R: Tensor, weight_R: Tensor, columns: Columns) -> Tensor:
        """Return the loss of some responses of the batch, summed and not divided; `columns` are those of these responses."""
        ...

    def figures(self, value_R: FloatArray, columns: Columns) -> dict[str, float]:
        """Return figures of some responses as sums over their prompts; divided by the batch's prompts they are means."""
        return {}


def check_column(columns: Columns, value_R: FloatArray | None, name: str, *, objective: str, remedy: str) -> FloatArray:
    """Return the column; ValueError, with the rows, unless it is there and finite."""
    if value_R is None:
        raise ValueError(f"{name}: no such column; the objective {objective} needs one for these responses; {remedy}")
    bad_R = ~np.isfinite(value_R)
    if bad_R.any():
        rows = [columns.row_ids[g] for g in np.unique(columns.group_R[bad_R])]
        raise ValueError(
            f"{name}: {int(bad_R.sum())} of {len(value_R)} values are NaN or infinite, in {len(rows)} rows "
            f"(first: {', '.join(rows[:3])}); expected finite numbers; {remedy}"
        )
    return value_R


def largest_of_sets(value_R: FloatArray, set_R: np.ndarray) -> FloatArray:
    """Return for each response the largest value of its set."""
    largest_S = np.full(int(set_R.max()) + 1, -np.inf)
    np.maximum.at(largest_S, set_R, value_R)
    largest: FloatArray = largest_S[set_R]
    return largest
