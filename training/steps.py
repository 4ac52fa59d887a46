"""The steps of a run: which rows, which weights, in which order. Fixed before the first forward pass.

`Steps` joins a plan, an objective and a way to get one value per response; it is what the loop trains on.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from training.data.batch import digest_plan, plan_steps
from training.data.examples import Example
from training.loop import Part
from training.memory import MicroBatchSize
from training.objectives.objective import Columns, FloatArray, Objective, largest_of_sets
from training.objectives.weights import check_weights, describe_weights
from training.tree import send

# R responses of a global batch, B of a micro-batch, K of a row

HELDOUT_ROWS = 16  # whose loss is followed while a model trains


class Forwarded(NamedTuple):
    """What a forward pass gives: one value per sample, and how many tokens went through the model."""

    value_B: Tensor
    num_tokens: int  # without padding
    num_padded: int  # with padding
    flops: int = 0  # of forward and backward pass; 0 where nobody counts them
    weighted: Tensor | None = (
        None  # sum slope_B value_B, float64, where slopes are given: then it alone is differentiable
    )


class Forward(Protocol):
    """How a model turns samples into one value each."""

    value: str  # what that is, as figures name it: logp, in nats and summed over trained tokens, or reward

    def identity(self, sample: Any) -> bytes:
        """Return what a sample is, for the digest of the plan."""
        ...

    def cut(
        self, samples: Sequence[Any], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
    ) -> list[list[int]]:
        """Return micro-batches as indices, each within a budget of tokens, enough for all ranks."""
        ...

    def size(self, samples: Sequence[Any], group_B: np.ndarray) -> MicroBatchSize:
        """Return what one micro-batch takes, padding included; samples of a group are neighbours."""
        ...

    def load(self, samples: Sequence[Any], group_B: np.ndarray) -> Any:
        """Return one micro-batch, on its way to the device; samples of a group are neighbours."""
        ...

    def values(self, model: Any, micro: Any, slope_B: FloatArray | None = None) -> Forwarded:
        """Run one micro-batch. A forward pass that can make use of slopes, d loss / d value, gives the sum of both at once."""
        ...


class Batch(NamedTuple):
    """A micro-batch of a step: what goes through the model, and the columns of its responses."""

    micro: Any
    weight_B: FloatArray
    slope_B: FloatArray | None  # d loss / d value, where the objective knows it before there are values
    columns_B: Columns
    columns: Columns  # of the global batch
    members: list[int]  # where its responses are in there


def find_slopes(objective: Objective, weight_B: FloatArray, columns_B: Columns) -> FloatArray:
    """Return d loss_sum / d value of each response, of an objective that is linear in them."""
    with torch.enable_grad():
        value_B = torch.zeros(len(weight_B), dtype=torch.float64, requires_grad=True)
        (slope_B,) = torch.autograd.grad(objective.loss_sum(value_B, torch.from_numpy(weight_B), columns_B), value_B)
    found: FloatArray = slope_B.numpy()
    return found


def gather_columns(examples: Sequence[Example]) -> Columns:
    """Return the stored columns of some rows as one batch."""
    counts = [len(example.samples) for example in examples]
    return Columns(
        row_ids=tuple(example.row_id for example in examples),
        group_R=np.repeat(np.arange(len(examples)), counts),
        num_tokens_R=np.concatenate([example.num_tokens_K for example in examples]),
        reward_R=join_column([example.reward_K for example in examples]),
        logp_ref_R=join_column([example.logp_ref_K for example in examples]),
        logq_R=join_column([example.logq_K for example in examples]),
        preferred_R=np.concatenate([mark_preferred(example) for example in examples]),
    )


def mark_preferred(example: Example) -> FloatArray:
    """Return preferred_K: 1 for the preferred response, 0 for the others, NaN where nobody said."""
    if example.preferred is None:
        return np.full(len(example.samples), np.nan)
    return (np.arange(len(example.samples)) == example.preferred).astype(np.float64)


def group_responses(columns: Columns) -> dict[str, np.ndarray]:
    """Return which responses are chosen, rejected, and of the highest reward of their prompt, as far as that is known."""
    kinds: dict[str, np.ndarray] = {}
    if columns.preferred_R is not None:
        kinds |= {"chosen": columns.preferred_R == 1, "rejected": columns.preferred_R == 0}
    if columns.reward_R is not None:
        kinds["best"] = columns.reward_R == largest_of_sets(columns.reward_R, columns.group_R)
    return {name: kind_R for name, kind_R in kinds.items() if kind_R.any()}


def join_column(parts: Sequence[FloatArray | None]) -> FloatArray | None:
    """Return a column over several rows, or None where it is not stored."""
    stored = [part for part in parts if part is not None]
    assert len(stored) in (0, len(parts)), "a column is stored for all rows or for none"
    return np.concatenate(stored) if stored else None


class Steps:
    """The plan of a run with its weights; satisfies `training.loop.Work`."""

    def __init__(
        self,
        examples: Sequence[Example],
        objective: Objective,
        forward: Forward,
        *,
        batch_prompts: int,
        epochs: int,
        seed: int,
        mean_tokens: float | None = None,
    ) -> None:
        self._examples = examples
        self._objective = objective
        self._forward = forward
        self._rows = plan_steps(len(examples), batch_prompts=batch_prompts, epochs=epochs, seed=seed)
        self._weights = [self._weigh(step) for step in range(len(self._rows))]
        self.num_steps = len(self._rows)
        self.steps_per_epoch = self.num_steps // epochs
        # One constant for the whole run, given for rows beside those that are trained on: it only makes the loss read as nats per token.
        own = float(np.concatenate([example.num_tokens_K for example in examples]).mean())
        self.mean_tokens = own if mean_tokens is None else mean_tokens

    def _weigh(self, step: int) -> FloatArray:
        weight_R = self._objective.weigh(self.columns(step))
        check_weights(weight_R, step=step, row_ids=self.row_ids(step))
        return weight_R

    @cached_property
    def digest(self) -> str:
        """64 hex digits over rows, their tokens, reference log-probabilities, weights and constants of all steps."""
        order, samples, logps = self._parts()
        weights = [weight_R.tobytes() for weight_R in self._weights]
        return digest_plan([*order, repr(self.mean_tokens), *weights, *logps, *samples])

    @cached_property
    def digests(self) -> dict[str, str]:
        """What `digest` covers and is stored, each by its own, to say what differs between two runs."""
        order, samples, logps = self._parts()
        return {"rows": digest_plan([*order, *samples]), "reference": digest_plan(logps)}

    def _parts(self) -> tuple[list[str], list[bytes], list[bytes]]:
        """Return row ids in order, token ids and reference log-probabilities."""
        samples = [self._forward.identity(s) for example in self._examples for s in example.samples]
        logps = [example.logp_ref_K.tobytes() for example in self._examples if example.logp_ref_K is not None]
        order = json.dumps([self.row_ids(step) for step in range(self.num_steps)])
        return [order], samples, logps

    def rows(self, step: int) -> list[Example]:
        """Return the rows of a step."""
        return [self._examples[index] for index in self._rows[step]]

    def row_ids(self, step: int) -> list[str]:
        """Return the ids of a step's rows."""
        return [example.row_id for example in self.rows(step)]

    def samples(self, step: int) -> list[Any]:
        """Return the responses of a step."""
        return [sample for example in self.rows(step) for sample in example.samples]

    def columns(self, step: int) -> Columns:
        """Return the stored columns of a step."""
        return gather_columns(self.rows(step))

    def weights(self, step: int) -> FloatArray:
        """Return weight_R of a step."""
        return self._weights[step]

    def describe(self, step: int) -> dict[str, float]:
        """Return the figures of a step's weights; nothing where they count comparisons within a prompt."""
        return {} if self._objective.whole_groups else describe_weights(self.columns(step), self._weights[step])

    def cut(self, step: int, *, budget: int, ranks: int = 1) -> list[list[int]]:
        """Return the micro-batches of a step as positions among its responses, enough for all ranks."""
        samples, group_R, whole = self.samples(step), self.columns(step).group_R, self._objective.whole_groups
        return self._forward.cut(samples, group_R, budget=budget, whole_groups=whole, ranks=ranks)

    def load(self, step: int, members: Sequence[int]) -> Batch:
        """Return some responses of a step as a micro-batch."""
        columns, samples = self.columns(step), self.samples(step)
        columns_B = columns.take(members)
        micro = self._forward.load([samples[index] for index in members], columns_B.group_R)
        weight_B, denominator = self._weights[step][list(members)], self._denominator(columns)
        slope_B = find_slopes(self._objective, weight_B, columns_B) / denominator if self._objective.linear else None
        return Batch(micro, weight_B, slope_B, columns_B, columns, list(members))

    def _denominator(self, columns: Columns) -> float:
        return self._objective.denominator(columns, mean_tokens=self.mean_tokens)

    def part(self, model: Any, batch: Batch) -> Part:
        """Run some responses of a step and return their share of its loss and figures."""
        slope_B = batch.slope_B if torch.is_grad_enabled() else None
        out = self._forward.values(model, batch.micro, slope_B)
        loss = out.weighted
        if loss is None:
            weight_B = send(batch.weight_B, device=out.value_B.device)
            loss = self._objective.loss_sum(out.value_B, weight_B, batch.columns_B) / self._denominator(batch.columns)
        # The step's figures wait for its last micro-batch: they hold neither this one's tokens and masks nor its graph.
        value_B, told = out.value_B.detach(), batch._replace(micro=None)
        return Part(
            loss=loss,
            num_tokens=out.num_tokens,
            num_padded=out.num_padded,
            flops=out.flops,
            figures=lambda: self._figures(value_B.cpu().numpy(), told),
        )

    def _figures(self, value_B: FloatArray, batch: Batch) -> dict[str, float]:
        sums = self._objective.figures(value_B, batch.columns_B)
        figures = {name: value / len(batch.columns.row_ids) for name, value in sums.items()}
        if batch.columns_B.logp_ref_R is not None:
            ratio = (value_B - batch.columns_B.logp_ref_R).sum() / len(batch.columns.group_R)
            figures["logp_ratio"] = float(ratio)
        for name, kind_R in group_responses(batch.columns).items():
            figures[f"{self._forward.value}_{name}"] = float(value_B[kind_R[batch.members]].sum() / kind_R.sum())
        return figures
