"""Batches: which rows an optimiser step takes, decided up front, and how a step is cut into forward passes.

The plan is part of what a run means: it depends on rows, seed and global batch only. Micro-batches are runtime: they depend
on a token budget and change nothing but speed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from training.config import Layout
from training.data.stems import Family, find_families, find_stems
from training.render import Rendered
from training.tree import Tree, send

# R responses of a global batch, B sequences or samples of a micro-batch, T tokens, P positions that predict a trained token


def plan_steps(num_rows: int, *, batch_prompts: int, epochs: int, seed: int) -> list[list[int]]:
    """Return for every optimiser step of the run the indices of its rows, shuffled by (seed, epoch).

    A row brings its whole group of K responses, so no group is ever split. The last batch of an epoch that is not full stays a step
    of its own when it has at least half of `batch_prompts` rows; a smaller one joins the step before, so that a handful of rows never
    weighs as much as a full batch.
    """
    steps: list[list[int]] = []
    last = count_steps(num_rows, batch_prompts=batch_prompts) - 1
    for epoch in range(epochs):
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows).tolist()
        steps += [order[place * batch_prompts : (place + 1) * batch_prompts] for place in range(last)]
        steps.append(order[last * batch_prompts :])
    return steps


def count_steps(num_rows: int, *, batch_prompts: int) -> int:
    """Return how many steps `plan_steps` makes of an epoch. ValueError where there is nothing to make one of."""
    if num_rows < 1:
        raise ValueError("batch plan: no rows to train on; expected at least 1; check what was dropped and why")
    full, left = divmod(num_rows, batch_prompts)
    return full + (left > 0 and (full == 0 or 2 * left >= batch_prompts))


def digest_plan(parts: Iterable[str | bytes]) -> str:
    """Return 64 hex digits of SHA-256 over what fixes the steps: row ids in order, token ids, weights, constants."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def pack_by_tokens(lengths: Sequence[int], *, budget: int, counts: Sequence[int] | None = None) -> list[list[int]]:
    """Return batches of indices, longest first, whose padded size (longest length x count) stays within `budget` tokens.

    With `counts` an index stands for so many rows, of which the longest has its length. A length above the budget gets a batch of its
    own: how large a forward pass is never decides what is computed.
    """
    if budget < 1:
        raise ValueError(f"token budget: got {budget}, expected at least 1")
    counts = counts or [1] * len(lengths)
    batches: list[list[int]] = []
    rows = 0  # of the last batch
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in order:
        rows += counts[index]
        # Sorted from the longest, so a batch's first member sets its padded length.
        if batches and lengths[batches[-1][0]] * rows <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            rows = counts[index]
    return batches


def cut(
    samples: Sequence[Rendered], group_R: np.ndarray, *, budget: int, whole_groups: bool, layout: Layout, ranks: int = 1
) -> list[list[int]]:
    """Return micro-batches as indices, each within a budget of tokens, enough for all ranks; a lone sample above it gets one of its own."""
    if layout == Layout.tree:
        return cut_trees(samples, group_R, budget=budget, whole_groups=whole_groups, ranks=ranks)
    lengths = [len(sample.inputs) for sample in samples]
    return cut_rows(lengths, group_R, budget=budget, whole_groups=whole_groups, ranks=ranks)


def cut_rows(
    lengths: Sequence[int], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
) -> list[list[int]]:
    """Return micro-batches of separate rows, as indices; `whole_groups` keeps the responses of a prompt together."""
    if not whole_groups:
        return share_rows(partial(pack_by_tokens, lengths), budget=budget, ranks=ranks)
    groups = members_of_groups(group_R)
    longest = [max(lengths[index] for index in members) for members in groups]
    pack = partial(pack_by_tokens, longest, counts=[len(members) for members in groups])
    batches = share_rows(pack, budget=budget, ranks=ranks)
    return [list(chain(*(groups[g] for g in sorted(batch)))) for batch in batches]


def cut_trees(
    samples: Sequence[Rendered], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
) -> list[list[int]]:
    """Return micro-batches of trees, as indices, whose tokens stay within `budget`: what prompts share once, the rest of a prompt once, its
    responses behind it.

    A group above the budget is cut into trees that repeat its prompt, unless `whole_groups`. As many as the budget needs, or so many that all
    ranks have equally many, about equally full: none is too small to keep a device busy.
    """
    branches: list[list[int]] = []
    for members in members_of_groups(group_R):
        responses = [samples[index].num_trained for index in members]
        parts = split_group(samples[members[0]].start, responses, budget=budget)
        branches += [members] if whole_groups else [[members[k] for k in part] for part in parts]
    prompts, responses = read_groups(samples, branches)
    families = find_families(prompts, responses)
    sizes = [len(prompt) + tokens for prompt, tokens in zip(prompts, responses, strict=True)]
    full = first_fit(sizes, budget=budget, families=families)
    even = spread(sizes, count=min(len(sizes), -(-len(full) // ranks) * ranks), families=families)
    stems = {index: (place, family.stem) for place, family in enumerate(families) for index in family.groups}
    tokens, evenly = ([count_filled(sizes, batch, stems) for batch in batches] for batches in (full, even))
    fits = all(len(batch) == 1 or filled <= budget for batch, filled in zip(even, evenly, strict=True))
    # Levelled, what several families share may be read more often.
    better = fits and (len(even) > len(full) or sum(evenly) <= sum(tokens))
    return [list(chain(*(branches[place] for place in batch))) for batch in (even if better else full)]


def first_fit(sizes: Sequence[int], *, budget: int, families: Sequence[Family]) -> list[list[int]]:
    """Return batches of indices whose tokens stay within a budget: the largest first, each into the first batch with room: within 11/9 of the
    fewest batches. A family fills those that read its stem; what is left goes into the first with room for all of it, or into another."""
    batches: list[list[int]] = []
    room: list[int] = []
    for members, stem in sort_families(sizes, families):
        left = sum(sizes[index] - stem for index in members)
        reading: list[int] = []  # batches that read the stem
        for index in members:
            own = sizes[index] - stem
            fits = next((place for place in reading if own <= room[place]), None)
            if fits is None:
                fits = next((place for place, free in enumerate(room) if stem + left <= free), len(batches))
                if fits == len(batches):
                    batches.append([])
                    room.append(budget)
                reading.append(fits)
                room[fits] -= stem
            batches[fits].append(index)
            room[fits] -= own
            left -= own
    return batches


def spread(sizes: Sequence[int], *, count: int, families: Sequence[Family]) -> list[list[int]]:
    """Return indices in some batches of about equal tokens: the largest first, each into the batch that is emptiest then."""
    batches: list[list[int]] = [[] for _ in range(count)]
    filled = np.zeros(count, dtype=np.int64)
    for members, stem in sort_families(sizes, families):
        unread = np.full(count, stem)
        for index in members:
            place = int((filled + unread).argmin())
            batches[place].append(index)
            filled[place] += unread[place] + sizes[index] - stem
            unread[place] = 0
    return batches


def sort_families(sizes: Sequence[int], families: Sequence[Family]) -> list[tuple[list[int], int]]:
    """Return (members, stem) of families, and members, the largest first."""
    ordered = [(sorted(f.groups, key=lambda index: (-sizes[index], index)), f.stem) for f in families]
    return sorted(ordered, key=lambda pair: (-sum(sizes[index] - pair[1] for index in pair[0]) - pair[1], pair[0][0]))


def count_filled(sizes: Sequence[int], batch: Sequence[int], stems: dict[int, tuple[int, int]]) -> int:
    """Return the tokens of a batch, in which what a family shares is read once; `stems` has (family, tokens of its stem) of each index."""
    here = {stems[index] for index in batch}
    return sum(sizes[index] - stems[index][1] for index in batch) + sum(stem for _, stem in here)


def share_rows(pack: Callable[..., list[list[int]]], *, budget: int, ranks: int) -> list[list[int]]:
    """Return what pack(budget=...) gives for the smallest budget that takes no more batches than the whole one, rounded up to equally many for
    each rank. For one rank it is the whole one: smaller batches would only be padded more."""
    batches = pack(budget=budget)
    wanted = -(-len(batches) // ranks) * ranks
    low, high = 0, budget
    while ranks > 1 and high - low > max(1, high // 64):
        middle = (low + high) // 2
        smaller = pack(budget=middle)
        if len(smaller) > wanted:
            low = middle
        else:
            high, batches = middle, smaller
    return batches


def split_group(prompt: int, responses: Sequence[int], *, budget: int) -> list[list[int]]:
    """Return the places of responses, by their trained tokens, in parts that each fit the budget with the prompt's; a part has at least one."""
    parts: list[list[int]] = []
    size = 0
    for place, trained in enumerate(responses):
        size += trained - 1  # the last one is not read
        if not parts or size > budget:
            parts.append([])
            size = prompt + trained - 1
        parts[-1].append(place)
    return parts


def count_tokens(samples: Sequence[Rendered], group_B: np.ndarray, *, layout: Layout) -> int:
    """Return the tokens of a micro-batch as it goes through the model, padding included."""
    if layout == Layout.rows:
        return len(samples) * max(len(sample.inputs) for sample in samples)
    prompts, responses = read_groups(samples, members_of_groups(group_B))
    return sum(stem.end - stem.begin for stem in find_stems(prompts, responses)) + sum(responses)


def members_of_groups(group_R: np.ndarray) -> list[list[int]]:
    """Return the indices of each group's responses; a group's responses are neighbours."""
    parts = np.split(np.arange(len(group_R)), np.flatnonzero(np.diff(group_R)) + 1)
    return [part.tolist() for part in parts if len(part)]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass: rows padded on the right, or one flat sequence of trees.

    Under causal attention nothing real ever sees padding on its right, so rows need neither mask nor positions.
    """

    ids_BT: Tensor  # int64
    predictor_P: Tensor  # int64, flat index in [B * T] of the token before each trained one
    target_P: Tensor  # int64, the trained tokens, sample after sample
    trained: tuple[int, ...]  # trained tokens of each sample
    spans: Sequence[tuple[int, int]]  # (position of the first token, length) of what is read through, no padding
    attention_BT: Tensor | None = None
    position_BT: Tensor | None = None
    tree: Tree | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(length for _, length in self.spans)


def lay_out(samples: Sequence[Rendered], group_B: np.ndarray, *, device: torch.device, layout: Layout) -> MicroBatch:
    """Return a micro-batch of samples; those of a group are neighbours."""
    if layout == Layout.tree:
        return collate_trees(samples, group_B, device=device)
    return collate(samples, device=device)


def collate(samples: Sequence[Rendered], *, device: torch.device) -> MicroBatch:
    """Pad samples into one micro-batch, a row each."""
    T = max(len(sample.inputs) for sample in samples)
    ids_BT = np.zeros((len(samples), T), dtype=np.int64)
    for row, sample in enumerate(samples):
        ids_BT[row, : len(sample.inputs)] = sample.inputs
    predictor_P = np.concatenate(
        [row * T + np.arange(sample.start - 1, len(sample.inputs)) for row, sample in enumerate(samples)]
    )
    return MicroBatch(
        ids_BT=send(ids_BT, device=device),
        predictor_P=send(predictor_P, device=device),
        target_P=gather_targets(samples, device=device),
        trained=tuple(sample.num_trained for sample in samples),
        spans=[(0, len(sample.inputs)) for sample in samples],
    )


def collate_trees(samples: Sequence[Rendered], group_B: np.ndarray, *, device: torch.device) -> MicroBatch:
    """Lay samples end to end, the prompt of neighbours of one group once, and once what prompts share of it."""
    groups = members_of_groups(group_B)
    ids: list[np.ndarray] = []
    parents: list[int] = []
    places: list[int] = []  # of stems among all segments
    predictors: dict[int, np.ndarray] = {}  # of each sample
    end = 0
    for stem in find_stems(*read_groups(samples, groups)):
        places.append(len(ids))
        parents.append(-1 if stem.parent is None else places[stem.parent])
        ids.append(samples[groups[stem.group][0]].ids_T[stem.begin : stem.end])
        prompt_end = end = end + stem.end - stem.begin
        for index in chain(*(groups[g] for g in stem.ending)):
            response = samples[index].inputs[samples[index].start :]
            if len(response):
                ids.append(response)
                parents.append(places[-1])
            # the prompt's last token predicts the first of every response
            predictors[index] = np.r_[prompt_end - 1, np.arange(end, end + len(response))]
            end += len(response)
    tree = Tree(lengths=tuple(map(len, ids)), parents=tuple(parents), device=device)
    return MicroBatch(
        ids_BT=send(np.concatenate(ids).astype(np.int64)[None], device=device),
        predictor_P=send(np.concatenate([predictors[index] for index in range(len(samples))]), device=device),
        target_P=gather_targets(samples, device=device),
        trained=tuple(sample.num_trained for sample in samples),
        spans=tree.spans,
        position_BT=send(tree.positions()[None], device=device),
        tree=tree,
    )


def read_groups(samples: Sequence[Rendered], groups: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[int]]:
    """Return of each group its prompt, and the tokens of its responses that are read."""
    prompts = [samples[members[0]].ids_T[: samples[members[0]].start] for members in groups]
    return prompts, [sum(samples[index].num_trained - 1 for index in members) for members in groups]


def gather_targets(samples: Sequence[Rendered], *, device: torch.device) -> Tensor:
    """Return target_P, sample after sample."""
    return send(np.concatenate([s.ids_T[s.start :] for s in samples]).astype(np.int64), device=device)
