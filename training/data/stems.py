"""Prompts that begin alike: what several of a micro-batch share, a system prompt or the turns before, goes through the model once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# What is shared saves its tokens in all prompts but one, and costs all that hangs on it one more stretch of keys to attend to, on a GPU a whole
# block: of a billion parameters what some 5 of its 128 queries take otherwise (docs/performance.md).
WORTH = 1 / 32  # tokens saved, of those that hang on what is shared


@dataclass(frozen=True)
class Stem:
    """Tokens [begin, end) of a group's prompt, which all prompts that go on from there have."""

    parent: int | None  # the place of the stem before it; None where it begins the prompt
    group: int
    begin: int
    end: int
    ending: tuple[int, ...]  # groups whose prompt ends here


def find_stems(prompts: Sequence[np.ndarray], responses: Sequence[int]) -> list[Stem]:
    """Return the stems that make up some prompts (token ids, none empty), each right before those that go on from it.

    `responses` are the tokens of each prompt's responses: two prompts share what they begin with where that is worth it (`WORTH`). Prompts
    that share nothing keep their order.
    """
    if not prompts:
        return []
    stems: list[Stem] = []
    in_order = sorted(range(len(prompts)), key=lambda group: prompts[group].astype(">u4").tobytes())
    waiting: list[tuple[int | None, int, tuple[int, list[int]]]] = []
    waiting += [(None, 0, part) for part in reversed(split_run(prompts, responses, in_order, 0))]
    while waiting:
        parent, begin, (end, run) = waiting.pop()
        ending = tuple(sorted(group for group in run if len(prompts[group]) == end))
        if rest := [group for group in run if len(prompts[group]) > end]:
            waiting += [(len(stems), end, part) for part in reversed(split_run(prompts, responses, rest, end))]
        stems.append(Stem(parent, run[0], begin, end, ending))
    return stems


def split_run(
    prompts: Sequence[np.ndarray], responses: Sequence[int], run: list[int], begin: int
) -> list[tuple[int, list[int]]]:
    """Return (end, prompts that share [begin, end) and that it is worth for, or one alone with all that is left of it) of a run, first come first.

    A run are prompts that share what lies before `begin`, in order of their tokens, so that neighbours share most.
    """
    parts: list[tuple[int, list[int]]] = []
    waiting = [run]
    while waiting:
        run = waiting.pop()
        shared = [count_shared(prompts[a], prompts[b]) for a, b in pairwise(run)]
        end = min(shared, default=len(prompts[run[0]]))
        hanging = sum(len(prompts[group]) - end + responses[group] for group in run)
        if len(run) == 1 or (len(run) - 1) * (end - begin) >= WORTH * hanging:
            parts.append((end, run))
            continue
        cuts = [0, *(place + 1 for place, count in enumerate(shared) if count == end), len(run)]
        waiting += [run[left:right] for left, right in pairwise(cuts)]
    return sorted(parts, key=lambda part: min(part[1]))


def count_beginning(prompts: Sequence[np.ndarray]) -> int:
    """Return how many tokens all of some prompts begin with; 0 where there is but one."""
    return min((count_shared(prompts[0], prompt) for prompt in prompts[1:]), default=0)


@dataclass(frozen=True)
class Family:
    """Prompts of which any two would share what all begin with; one that would share nothing is alone in its own."""

    groups: tuple[int, ...]
    stem: int  # tokens


def find_families(prompts: Sequence[np.ndarray], responses: Sequence[int]) -> list[Family]:
    """Return the families of some prompts, in the order of their first ones."""
    stems = find_stems(prompts, responses)
    root: list[int] = []
    members: dict[int, list[int]] = {}
    for place, stem in enumerate(stems):
        root.append(place if stem.parent is None else root[stem.parent])
        members.setdefault(root[-1], []).extend(stem.ending)
    families: list[Family] = []
    for place, groups in members.items():
        end = stems[place].end
        most = max(len(prompts[group]) - end + responses[group] for group in groups)
        if len(groups) > 1 and end >= 2 * WORTH * most:
            families.append(Family(tuple(groups), end))
        else:
            families += [Family((group,), 0) for group in groups]
    return families


def count_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two prompts begin with alike."""
    size = min(len(first), len(second))
    others = np.flatnonzero(first[:size] != second[:size])
    return int(others[0]) if len(others) else size
