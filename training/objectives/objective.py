"""What an objective is: a config that says what it trains on, weights from stored columns, and a loss of one value per response.

The weights are computed in float64 from the columns of the whole global batch, before anything is cut into forward passes,
so hardware cannot touch them. The loss is a sum over responses, divided by a count of the whole global batch.

The file of an objective holds its config too, which is read where there is no torch: torch is imported by what computes a loss.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from training.config import Config, LoraConfig, Precision, ResponseRegime, Schedule, StoredColumn
from training.data.selection import Select

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = NDArray[np.float64]

# R responses of a global batch, N in matrices of its G groups (prompts)


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


@dataclass(frozen=True)
class Cross:
    """What the responses of a batch are worth under each of its prompts."""

    reward_GN: FloatArray
    logp_ref_GN: FloatArray  # nats, summed over trained tokens


Crosses = Mapping[tuple[str, ...], Cross]  # by the row ids of a batch


class TrainConfig(Config):
    """What every objective shares, and what a run must know of one before there is any."""

    learning_rate: float = Field(1e-5, gt=0, title="Learning rate", description="Peak AdamW learning rate, above 0.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        title="Weight decay",
        description="AdamW weight decay of matrices, at least 0; norms and biases have none.",
    )
    schedule: Schedule = Field(Schedule.cosine, title="Schedule", description="Learning rate after warm-up.")
    warmup_fraction: float = Field(
        0.1, ge=0, le=1, title="Warm-up", description="Share of steps with rising learning rate, from 0 to 1."
    )
    epochs: int = Field(1, ge=1, title="Epochs", description="Passes over the train split, at least 1.")
    batch_prompts: int = Field(
        16,
        ge=1,
        title="Global batch",
        description="Prompts per optimiser step, at least 1. Each brings its K responses, never split.",
    )
    max_tokens: int = Field(
        1024,
        ge=8,
        title="Longest sequence",
        description="Rows whose prompt and longest response exceed this many tokens are dropped and counted; at least 8.",
    )
    max_grad_norm: float = Field(1.0, gt=0, title="Gradient clipping", description="Largest gradient norm, above 0.")
    precision: Precision = Precision.float32
    lora: LoraConfig = Field(
        LoraConfig(),
        title="Low-rank adapter",
        description="LoRA: low-rank matrices beside the weights; rank 0 trains the weights themselves.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, title="Seed", description="Order of the rows, and LoRA's first matrices; at least 0."
    )
    objective: str = Field(title="Objective")  # narrowed by each objective to its own name

    # Whether the loss of a response depends on the others of its prompt, so that they stay in one forward pass.
    whole_groups: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[StoredColumn, ...]:
        """What is scored before this objective trains."""
        return ()

    @abstractmethod
    def choose_responses(self, regime: ResponseRegime) -> tuple[Select, int]:
        """Return which responses of a row are trained on, and the fewest that make a row worth keeping."""

    @abstractmethod
    def make(self, columns: Columns, *, regime: ResponseRegime, cross: Crosses) -> "Objective":
        """Return the objective. `columns` are those of the whole train split; `cross` is empty where it is not asked for."""


class Objective(Protocol):
    """One way to train. `value_R` is a log-probability (policies) or a reward (reward models) of each response.

    Pure functions of values, weights and stored columns; classes inherit from it to get what most objectives have in common.
    """

    whole_groups: bool  # as its config has it
    linear: bool = False  # whether `loss_sum` is linear in the values, so that its gradient is known before them

    def transform(self, columns: Columns) -> Columns:
        """Return stored columns as they are weighed, such as with other rewards; a prompt's follow from that prompt alone."""
        return columns

    def weigh(self, columns: Columns) -> FloatArray:
        """Return weight_R, detached by nature: made of stored columns."""
        ...

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return what the sum over the global batch is divided by; `mean_tokens` is the data set's constant Tbar."""
        ...

    def loss_sum(self, value_R: "Tensor", weight_R: "Tensor", columns: Columns) -> "Tensor":
        """Return the loss of some responses of the batch, summed and not divided; `columns` are those of these responses."""
        ...

    def figures(self, value_R: FloatArray, columns: Columns) -> dict[str, float]:
        """Return figures of some responses as sums over their prompts; divided by the batch's prompts they are means."""
        return {}

    def summary(self, stored: Columns, columns: Columns, weight_R: FloatArray) -> dict[str, Any]:
        """Return what a finished run tells of itself; a `warning` in it is logged. `stored` are the columns of the train split
        as they came, `columns` those of the last epoch as they were weighed."""
        return {}


class WeightedLikelihood(Objective):
    """The weighted SFT loss sum_i w_i sum_t nll_it / (N * Tbar): such an objective has only to say what each response weighs.

    The weights of a global batch of N responses sum to N, which is checked before training.
    """

    whole_groups = TrainConfig.whole_groups
    linear = True

    def denominator(self, columns: Columns, *, mean_tokens: float) -> float:
        """Return N * Tbar: the loss reads as nats per token."""
        return len(columns.group_R) * mean_tokens

    def loss_sum(self, value_R: "Tensor", weight_R: "Tensor", columns: Columns) -> "Tensor":
        """Return - sum_i w_i log pi(y_i | x_i), never divided by a response's own length: that would change the optimum."""
        return -(weight_R * value_R).sum()


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
