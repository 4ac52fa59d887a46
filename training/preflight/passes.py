"""The checks that run the model: head, layout, and what the loss and the log-probabilities of the first step are."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import Precision
from training.data.batch import collate
from training.logprobs import (
    MAX_LAYOUT_GAP,
    LayoutError,
    check_head,
    check_layout,
    choose_groups,
    compare_gradients,
    sum_logps,
)
from training.model import DTYPES
from training.objectives.objective import WeightedLikelihood
from training.preflight.findings import ROWS_SHOWN, Failure, NotApplicable, Report
from training.preflight.ready import Ready
from training.render import Rendered
from training.reward.scorer import TOLERANCE, compare_batches
from training.sharding import as_layers

# R responses of the first step, B those that are tried, T tokens of one response

MOST_SECONDS = 30.0
LEAST_SECONDS = 5.0
SHARE_OF_RUN = 0.05
MOST_TRIED_TOKENS = 2048
HEAD_TOKENS = 64  # whose logits are held at once


@dataclass
class Passes:
    """The model's passes over responses of the first step, and how long they may take."""

    ready: Ready
    started: float  # of time.monotonic(): the first check, then the first whose passes are counted
    seconds_allowed: float = LEAST_SECONDS  # since then
    seconds_per_token: float = 0.0  # of a forward pass
    tried: list[int] = field(default_factory=list)  # responses of the first step, whole prompts
    value_B: np.ndarray = field(default_factory=lambda: np.zeros(0))  # of those

    def measure_speed(self) -> None:
        """Time one prompt's pass; choose how much of the first step is tried, and how long all may take."""
        ready, steps = self.ready, self.ready.steps
        group_R = steps.columns(0).group_R
        first = [index for index, group in enumerate(group_R) if group == group_R[0]]
        spent = ready.world.max(time.monotonic() - self.started)  # by the checks that are always whole
        if ready.device.type == "cuda":
            self.values(first)  # kernels are compiled and loaded once for the whole run, in what was spent too
            spent = 0.0
        self.started = time.monotonic()
        self.values(first)
        seconds = self.ready.world.max(time.monotonic() - self.started)  # of the slowest rank; all go by the same clock
        self.seconds_per_token = seconds / self.count(first)
        whole = range(len(group_R))
        of_run = sum(self.count(part) for part in self.cut(whole)) * steps.num_steps
        seconds = SHARE_OF_RUN * 3 * of_run * self.seconds_per_token
        self.seconds_allowed = round(max(LEAST_SECONDS, min(MOST_SECONDS, seconds) - spent), 3)
        # four forward passes in a third of the time
        tokens = min(MOST_TRIED_TOKENS, self.seconds_left() / 3 / 4 / self.seconds_per_token)
        groups = dict.fromkeys(group_R.tolist())
        self.tried = first
        for group in list(groups)[1:]:
            more = [*self.tried, *np.flatnonzero(group_R == group).tolist()]
            if self.count(more) > tokens:
                break
            self.tried = more
        started = time.monotonic()
        self.value_B = self.values(self.tried)
        # An accelerator takes as long for one prompt as for many.
        again = ready.world.max(time.monotonic() - started) / self.count(self.tried)
        self.seconds_per_token = min(self.seconds_per_token, again)

    def samples(self, members: Sequence[int]) -> list[Any]:
        """Return responses of the first step."""
        samples = self.ready.steps.samples(0)
        return [samples[index] for index in members]

    def count(self, members: Sequence[int]) -> int:
        """Return the tokens of responses of the first step, padding included."""
        group_B = self.ready.steps.columns(0).group_R[list(members)]
        return self.ready.forward.size(self.samples(members), group_B).tokens

    def values(self, members: Sequence[int]) -> np.ndarray:
        """Return value_B of responses of the first step, in passes of at most the budget."""
        group_B = self.ready.steps.columns(0).group_R[list(members)]
        samples, value_B = self.samples(members), np.zeros(len(members))
        with torch.no_grad(), self.ready.world.autocast(self.ready.precision):
            for part in self.cut(members):
                micro = self.ready.forward.load([samples[n] for n in part], group_B[part])
                out: Tensor = self.ready.forward.values(self.ready.policy, micro).value_B
                value_B[part] = out.double().cpu().numpy()
        return value_B

    def cut(self, members: Sequence[int], *, budget: int | None = None) -> list[list[int]]:
        """Return the micro-batches that training on one rank would make of responses of the first step, as places among them."""
        group_B, whole = self.ready.steps.columns(0).group_R[list(members)], self.ready.objective.whole_groups
        budget = budget or self.ready.runtime.microbatch_tokens
        return self.ready.forward.cut(self.samples(members), group_B, budget=budget, whole_groups=whole)

    def loss(self, members: Sequence[int], *, gradients: bool = False) -> float:
        """Return the loss of responses of the first step, in one pass; where gradients are asked for, as compiled layers compute it."""
        with torch.set_grad_enabled(gradients), self.ready.world.autocast(self.ready.precision):
            return self.ready.steps.part(self.ready.policy, self.ready.steps.load(0, members)).loss.item()

    def seconds_left(self) -> float:
        """Return what is left of the time allowed, the same on every rank."""
        passed = self.ready.world.max(time.monotonic() - self.started)
        return max(0.0, self.seconds_allowed - passed)


def output_head(ready: Ready) -> str:
    """Hidden states times output embedding are the model's logits, and the head as it trains has the gradients that torch finds through these."""
    first = ready.steps.samples(0)[0].ids_T[:HEAD_TOKENS]
    try:
        with as_layers(ready.world, precision=ready.precision):
            check_head(ready.policy, first)
    except ValueError as refusal:
        raise Failure(str(refusal), row_ids(ready, [0])) from refusal
    with ready.world.autocast(ready.precision):
        gaps = ready.policy(compare_gradients, first)
    bound = MAX_LAYOUT_GAP[DTYPES[ready.precision]]
    if not max(gaps) <= bound:  # NaN is not small
        raise Failure(
            f"log-probabilities of {len(first)} tokens and their gradients, as the head has them in training, differ by {gaps[0]:.3g} and {gaps[1]:.3g} of the "
            f"largest from those that torch finds through the logits; expected at most {bound:g}; torch's build or compiler is at fault",
            row_ids(ready, [0]),
        )
    return f"{len(first)} tokens: hidden states times output embedding are the logits; the gradients are torch's within {gaps[1]:.2g}"


def layout(ready: Ready) -> str:
    """What the layout gives is what each response gives alone; the model is ready for it afterwards."""
    try:
        count = check_layout_of(ready)
    except ValueError as refusal:
        raise Failure(str(refusal), rows_of(ready, refusal)) from refusal
    layout = ready.runtime.layout.value
    return f"{layout}: the log-probabilities of {count} rows, the longest and the shortest, are those of separate responses"


def rows_of(ready: Ready, refusal: ValueError) -> list[str]:
    """Return the rows that a layout's refusal is about: none where the model cannot have the layout whatever is read."""
    groups = looked_at(ready)
    firsts = [groups[place][0] for place in refusal.groups] if isinstance(refusal, LayoutError) else []
    return [next(e.row_id for e in ready.examples if any(s is first for s in e.samples)) for first in firsts]


def looked_at(ready: Ready) -> list[Sequence[Rendered]]:
    """Return the responses of the rows that show a layout's faults."""
    return choose_groups(example.samples for example in ready.examples)


def check_layout_of(ready: Ready) -> int:
    """Make the model ready for the run's layout and return how many rows were looked at; ValueError as `check_layout`."""
    groups = looked_at(ready)
    with as_layers(ready.world, precision=ready.precision):
        check_layout(
            ready.policy,
            groups,
            layout=ready.runtime.layout,
            device=ready.device,
            dtype=ready.layers_dtype,
            narrow=DTYPES[ready.precision] != ready.layers_dtype,  # as it will train
        )
    return len(groups)


def padding(ready: Ready) -> str:
    """Of a reward model: what the shortest and the longest responses get in one batch, padded, is what each gets alone."""
    samples = [(example.row_id, sample) for example in ready.examples for sample in example.samples]
    ordered = sorted(samples, key=lambda pair: len(pair[1].ids))
    tried = [*ordered[:1], *ordered[1:][-2:]]
    with as_layers(ready.world, precision=ready.precision):
        alone_B, together_B, gap_B = compare_batches(ready.policy, [sample for _, sample in tried])
    bound = TOLERANCE[Precision.float32 if ready.layers_dtype == torch.float32 else ready.precision]
    if not gap_B.max() <= bound:
        raise Failure(
            f"the rewards of {len(tried)} responses, the longest and the shortest, are {alone_B.tolist()} alone and {together_B.tolist()} in one "
            f"batch; expected equal ones within {bound:g}; check the padding token, or take another base",
            list(dict.fromkeys(row_id for row_id, _ in tried)),
        )
    return f"the rewards of {len(tried)} responses, the longest and the shortest, are those of each alone within {gap_B.max():.2g}"


def reference(ready: Ready, passes: Passes) -> str:
    """The policy, where it is the reference, gives the stored log-probabilities before its first step."""
    columns = ready.steps.columns(0)
    if columns.logp_ref_R is None:
        raise NotApplicable("the objective reads no reference log-probabilities")
    scored = read_summary(ready.job.inputs.get("reference"))  # of the policy's own weights, or it was refused
    tokens_B = columns.num_tokens_R[passes.tried]
    miss_B = np.abs(passes.value_B - columns.logp_ref_R[passes.tried])
    gap_B, mean = miss_B / tokens_B, miss_B.sum() / tokens_B.sum()
    bound = max(
        MAX_LAYOUT_GAP[DTYPES[p]] for p in (ready.precision, Precision(scored.get("precision", ready.precision)))
    )
    # A short response alone strays further than all together. Not "any above": a stored NaN is a failure too.
    if not (mean <= bound and (gap_B <= 10 * bound).all()):
        worst = np.argsort(-np.nan_to_num(gap_B, nan=np.inf))[:ROWS_SHOWN]
        raise Failure(
            f"the policy has the reference's weights, yet the stored log-probabilities of {len(gap_B)} responses differ by "
            f"{mean:.3g} nats a token from its own, those of one by {gap_B[worst[0]]:.3g}; expected at most {bound:g} and {10 * bound:g}; "
            "the chat template or the rows changed since, or the column is of another model: score the reference again",
            row_ids(ready, [passes.tried[place] for place in worst]),
        )
    return f"{len(gap_B)} responses: the policy's log-probabilities are the stored ones within {mean:.2g} nats a token (at most {bound:g})"


def unit_weights(ready: Ready, report: Report) -> str:
    """With weights of 1 the loss is the sum of the stock model's cross-entropies. Before trees replace its attention."""
    if not isinstance(ready.objective, WeightedLikelihood):
        raise NotApplicable("the objective is no weighted likelihood")
    if any(check.name == "output_head" for check in report.failures):
        raise NotApplicable("what the output head gives is wrong")
    samples = ready.steps.samples(0)
    members = sorted(range(len(samples)), key=lambda index: len(samples[index].ids_T))[:2]
    samples = [samples[index] for index in members]
    # On one rank in float32 whatever the precision: this is about what is computed, not how closely.
    with torch.no_grad(), as_layers(ready.world, precision=ready.precision):
        logp_B = torch.cat([sum_logps(ready.policy, collate([sample], device=ready.device)) for sample in samples])
        expected = sum(ready.policy(stock_nll, sample, ready.device) for sample in samples)
    columns_B = ready.steps.columns(0).take(members)
    got = ready.objective.loss_sum(logp_B, torch.ones_like(logp_B), columns_B).item()
    tokens = sum(sample.num_trained for sample in samples)
    bound = MAX_LAYOUT_GAP[ready.layers_dtype]
    if not abs(got - expected) / tokens <= bound:
        raise Failure(
            f"the loss of {len(members)} responses with weights of 1 is {got:.6g}, the stock model's cross-entropy {expected:.6g} "
            f"nats; expected them to differ by at most {bound} a token; objective or architecture does not do what it says",
            row_ids(ready, members),
        )
    return (
        f"{tokens} tokens: {got / tokens:.6g} nats a token, {expected / tokens:.6g} by the stock model's cross-entropy"
    )


def microbatches(ready: Ready, passes: Passes) -> str:
    """The cut into micro-batches does not move the loss."""
    tried = [passes.tried[n] for n in passes.cut(passes.tried)[0]]  # what one pass has room for
    samples, group_B = passes.samples(tried), ready.steps.columns(0).group_R[tried]
    whole_groups = ready.objective.whole_groups
    cut = ready.forward.cut(samples, group_B, budget=max(1, passes.count(tried) // 2), whole_groups=whole_groups)
    if len(cut) < 2:
        raise NotApplicable("what is tried is one micro-batch, however small the budget")
    whole = passes.loss(tried)
    parts = sum(passes.loss([tried[b] for b in members]) for members in cut)
    fault = "what is trained would depend on runtime.microbatch_tokens"
    bound = None
    if ready.is_reward_model:  # a loss moves by no more than two of its rewards, whose head rounds them
        bound = 2 * TOLERANCE[ready.precision] * max(1.0, np.abs(passes.value_B).max())
    return require_same_loss(ready, tried, (whole, "in one pass"), (parts, f"in {len(cut)}"), fault=fault, bound=bound)


def compiled_layers(ready: Ready, report: Report, passes: Passes) -> str:
    """Compiled layers, which train, give the loss of the plain ones, which all other checks run."""
    tried = [passes.tried[n] for n in passes.cut(passes.tried, budget=report.microbatch_tokens)[0]]
    plain, compiled = passes.loss(tried), passes.loss(tried, gradients=True)
    fault = "the compiler is at fault: set runtime.compile to false"
    return require_same_loss(ready, tried, (compiled, "by compiled layers"), (plain, "by plain ones"), fault=fault)


def require_same_loss(
    ready: Ready,
    members: Sequence[int],
    one: tuple[float, str],
    other: tuple[float, str],
    *,
    fault: str,
    bound: float | None = None,
) -> str:
    """Return two losses of responses of the first step in words, each with how it was computed; Failure where they differ by more than a
    bound, or where none is given by more than a policy's log-probabilities may, relatively."""
    (got, how), (expected, as_expected) = one, other
    if bound is None:
        bound = MAX_LAYOUT_GAP[DTYPES[ready.precision]] * max(abs(got), abs(expected))
    if not abs(got - expected) <= bound:
        raise Failure(
            f"{len(members)} responses of the first step have a loss of {got:.6g} {how} and {expected:.6g} {as_expected}; "
            f"expected equal ones within {bound:.3g}; {fault}",
            row_ids(ready, members),
        )
    return f"{len(members)} responses: {got:.6g} {how}, {expected:.6g} {as_expected}"


def row_ids(ready: Ready, members: Sequence[int]) -> list[str]:
    """Return the rows of responses of the first step."""
    columns = ready.steps.columns(0)
    return list(dict.fromkeys(columns.row_ids[columns.group_R[index]] for index in members))


def stock_nll(model: Any, sample: Rendered, device: torch.device) -> float:
    """Return the negative log-likelihood of a response by the model's own logits and torch's cross-entropy, in nats."""
    ids_BT = torch.from_numpy(sample.ids_T.astype(np.int64))[None].to(device)
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0, sample.start - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits_TV, ids_BT[0, sample.start :], reduction="sum").item()


def read_summary(folder: Path | None) -> dict[str, Any]:
    """Return the summary of an input's step; nothing where it has none."""
    path = None if folder is None else folder / "summary.json"
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}
