"""The ranks of a run: which one this process is, and how they agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among those that train one model together. Alone, nothing is ever sent."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Say whether this is the rank that writes what all have in common."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over all ranks, in float64; every rank gives as many values and gets the same."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on any rank; every rank gets the same answer."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


ALONE = World(torch.device("cpu"))
