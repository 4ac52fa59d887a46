"""Batches: which rows an optimiser step takes, decided up front, and how a step is cut into forward passes.

The plan is part of what a run means: it depends on rows, seed and global batch only. Micro-batches are runtime: they depend
on a token budget and change nothing but speed.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.render import Rendered

# B sequences of a micro-batch, T tokens, P positions that predict a trained token


def plan_steps(num_rows: int, *, batch_prompts: int, epochs: int, seed: int) -> list[list[int]]:
    """Return for every optimiser step of the run the indices of its rows, shuffled by (seed, epoch).

    A row brings its whole group of K responses, so no group is ever split. The last batch of an epoch that is not full stays a step
    of its own when it has at least half of `batch_prompts` rows; a smaller one joins the step before, so that a handful of rows never
    weighs as much as a full batch.
    """
    if num_rows < 1:
        raise ValueError("batch plan: no rows to train on; expected at least 1; check what was dropped and why")
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows).tolist()
        batches = [order[begin : begin + batch_prompts] for begin in range(0, num_rows, batch_prompts)]
        if len(batches) > 1 and 2 * len(batches[-1]) < batch_prompts:
            batches[-2:] = [batches[-2] + batches[-1]]
        steps.extend(batches)
    return steps


def digest_plan(parts: Iterable[str | bytes]) -> str:
    """Return 64 hex digits of SHA-256 over what fixes the steps: row ids in order, token ids, weights, constants."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def pack_by_tokens(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Return batches of indices, longest first, whose padded size (longest length x count) stays within `budget` tokens.

    A length above the budget gets a batch of its own: how large a forward pass is never decides what is computed.
    """
    if budget < 1:
        raise ValueError(f"token budget: got {budget}, expected at least 1")
    batches: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in order:
        # Sorted from the longest, so a batch's first member sets its padded length.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass, padded on the right.

    Under causal attention nothing real ever sees padding on its right, so neither mask nor positions are given by default.
    """

    ids_BT: Tensor  # int64
    predictor_P: Tensor  # int64, flat index in [B * T] of the token before each trained one
    target_P: Tensor  # int64, the trained tokens
    members: tuple[int, ...]  # which samples these are
    num_tokens: int  # without padding
    attention_BT: Tensor | None = None
    position_BT: Tensor | None = None


def collate(samples: Sequence[Rendered], members: Sequence[int], *, device: torch.device) -> MicroBatch:
    """Pad the samples named by `members` into one micro-batch."""
    chosen = [samples[index] for index in members]
    T = max(len(sample.ids_T) for sample in chosen)
    ids_BT = np.zeros((len(chosen), T), dtype=np.int64)
    for row, sample in enumerate(chosen):
        ids_BT[row, : len(sample.ids_T)] = sample.ids_T
    predictor_P = np.concatenate(
        [row * T + np.arange(sample.start - 1, len(sample.ids_T) - 1) for row, sample in enumerate(chosen)]
    )
    target_P = np.concatenate([sample.ids_T[sample.start :] for sample in chosen]).astype(np.int64)
    return MicroBatch(
        ids_BT=torch.from_numpy(ids_BT).to(device),
        predictor_P=torch.from_numpy(predictor_P).to(device),
        target_P=torch.from_numpy(target_P).to(device),
        members=tuple(members),
        num_tokens=sum(len(sample.ids_T) for sample in chosen),
    )
