"""Work that adapts to the room there is on the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def run_in_halves(work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """Return work(items), or, when the device has no room for so many at once, the results of both halves in order.

    `work` must not care what else is in its batch. One item that does not fit alone is the device's limit, and raised.
    """
    try:
        return work(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
        torch.cuda.empty_cache()
    half = len(items) // 2  # outside the handler, which would keep the failed batch's tensors alive
    return run_in_halves(work, items[:half]) + run_in_halves(work, items[half:])
