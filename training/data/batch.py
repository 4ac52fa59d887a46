"""Batches: which rows an optimiser step takes, decided up front, and how a step is cut into forward passes."""

from collections.abc import Sequence


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
