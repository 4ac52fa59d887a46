"""What a column of rewards looks like, and whether it is more than a preference for long answers."""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr


class RewardStatistics:
    """Gathers rewards row by row. Keeps 16 bytes a response, for the rank correlation; all else is running sums."""

    def __init__(self) -> None:
        self._rewards = array("d")
        self._chars = array("d")
        self._within = 0.0  # sum over prompts of the squared deviations from the prompt's mean
        self._freedom = 0  # sum over prompts of K - 1
        self._counts: Counter[str] = Counter()
        self._won: defaultdict[str, float] = defaultdict(float)
        self._longer: defaultdict[str, float] = defaultdict(float)
        self._pairs: Counter[str] = Counter()

    def add(self, rewards: Sequence[float], *, chars: Sequence[int], preferred: int | None, split: str) -> None:
        """Take one row: its K rewards, the lengths of its responses, and the preferred one where somebody said."""
        self._rewards.extend(rewards)
        self._chars.extend(chars)
        self._counts["rows"] += 1
        self._counts["tied_rows"] += len(rewards) > 1 and max(rewards) == min(rewards)
        self._within += float(np.var(rewards)) * len(rewards)
        self._freedom += len(rewards) - 1
        if preferred is None:
            return
        for k in range(len(rewards)):
            if k != preferred:
                self._pairs[split] += 1
                self._won[split] += beats(rewards[preferred], rewards[k])
                self._longer[split] += beats(chars[preferred], chars[k])

    def summarise(self) -> dict[str, float | int]:
        """Return the figures; those that are not defined (no pair, one response) are absent.

        `pairwise_accuracy` is the share of known preferences whose preferred response has the larger reward, ties counting
        half; `length_baseline` is the same for "the longer one wins". Both also by split. `within_prompt_std` is
        sqrt(sum_g sum_k (r_gk - mean_g)^2 / sum_g (K_g - 1)), the unit of lambda.
        """
        rewards = np.frombuffer(self._rewards)
        figures: dict[str, float | int] = {
            "rows": self._counts["rows"],
            "responses": len(rewards),
            "tied_rows": self._counts["tied_rows"],
            "mean": float(rewards.mean()),
            "std": float(rewards.std()),
        }
        if self._freedom:
            figures["within_prompt_std"] = math.sqrt(self._within / self._freedom)
        if len(rewards) > 1 and rewards.std() > 0 and np.frombuffer(self._chars).std() > 0:
            figures["length_spearman"] = float(spearmanr(rewards, np.frombuffer(self._chars)).statistic)
        for prefix, splits in [("", list(self._pairs)), *((f"{split}_", [split]) for split in sorted(self._pairs))]:
            pairs = sum(self._pairs[split] for split in splits)
            if pairs:
                figures[f"{prefix}pairs"] = pairs
                figures[f"{prefix}pairwise_accuracy"] = sum(self._won[split] for split in splits) / pairs
                figures[f"{prefix}length_baseline"] = sum(self._longer[split] for split in splits) / pairs
        return figures


def beats(a: float, b: float) -> float:
    """Return 1 where a is larger, 0 where b is, a half where they are equal."""
    return 0.5 if a == b else float(a > b)
