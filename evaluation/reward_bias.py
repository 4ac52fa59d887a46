"""How often a reward model prefers the better answer of pairs whose better answer is known, and how much length speaks.

EvalBiasBench holds pairs in which something makes the worse answer attractive: its length, a familiar fact. A reward model below
one half there follows the bias. Legend: N pairs.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evaluation import statistics
from training.config import Config
from training.reward.statistics import beats

Values = NDArray[np.float64]


class Accuracy(Config):
    """Share of pairs whose better answer has the higher reward, a tie counting half, with its interval at 95 %."""

    group: str
    n: int
    accuracy: float
    low: float
    high: float
    length_baseline: float  # what "the longer answer is better" would have


class RewardBias(Config):
    """A reward model on a pair set."""

    name: str
    overall: Accuracy
    macro_accuracy: float  # unweighted mean of the groups
    longer_preferred: float  # share of pairs in which the longer answer has the higher reward, ties counting half
    length_spearman: (
        float | None
    )  # rank correlation of reward and characters over all answers; None where one is constant
    groups: tuple[Accuracy, ...]

    @property
    def flag(self) -> str | None:
        """Why nothing is shown of the reward model, or None."""
        if self.overall.low > 0.5:
            return None
        shown = f"{self.overall.accuracy:.1%} [{self.overall.low:.1%}, {self.overall.high:.1%}]"
        return f"chance: right in {shown} of {self.overall.n} pairs, not shown to be above guessing"


def measure(name: str, *, rows: Path, scores: Path) -> RewardBias:
    """Return the figures from the artifacts of `pair_set` and of `score_rewards` on it."""
    columns = ["row_id", "source", "responses"]
    table = pq.read_table(scores / "scores.parquet", columns=["row_id", "reward"]).to_pylist()
    reward = {row["row_id"]: row["reward"] for row in table}
    asked = pq.read_table(rows / "rows.parquet", columns=columns).to_pylist()
    # Without those that the reward model's template refuses.
    pairs = [pair for pair in asked if pair["row_id"] in reward]
    right_N = np.array([beats(*reward[pair["row_id"]]) for pair in pairs])
    longer_N = np.array([beats(*map(len, pair["responses"])) for pair in pairs])
    group_N = np.array([pair["source"] for pair in pairs])
    groups = [
        describe(group, right_N[group_N == group], longer_N[group_N == group])
        for group in dict.fromkeys(group_N.tolist())
    ]
    unlike_N = longer_N != 0.5
    agree_N = np.where(longer_N == 1, right_N, 1 - right_N)[unlike_N]
    return RewardBias(
        name=name,
        overall=describe("all", right_N, longer_N),
        macro_accuracy=float(np.mean([group.accuracy for group in groups])),
        longer_preferred=float(agree_N.mean()) if len(agree_N) else 0.5,
        length_spearman=json.loads((scores / "summary.json").read_text()).get("length_spearman"),
        groups=tuple(groups),
    )


def describe(group: str, right_N: Values, longer_N: Values) -> Accuracy:
    """Return the accuracy of some pairs."""
    low, high = statistics.score_interval(right_N)
    return Accuracy(
        group=group,
        n=len(right_N),
        accuracy=float(right_N.mean()),
        low=low,
        high=high,
        length_baseline=float(longer_N.mean()),
    )
