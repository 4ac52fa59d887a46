"""What a reward model says of a policy's answers to a prompt set, alone and against a baseline's answers to the same prompts.

The rows of the VAR paper (arXiv 2502.11026) that are rewards or win rates by reward model. Rewards have the scale of their
reward model: they are compared under one reward model, one template and one way of answering only.

Legend: N prompts. Answers to one prompt are not independent, so every interval is over prompts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evaluation import statistics
from evaluation.comparison import BOOTSTRAP_SEED, CONFIDENCE, Difference, describe_difference
from evaluation.harness.benchmark import MOST_UNUSABLE
from training.config import Config

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """A policy's answers to a prompt set, each list by row id."""

    rewards: Mapping[str, list[float]]
    characters: Mapping[str, list[int]]
    truncated_share: float  # of the answers, cut by the token limit
    empty_share: float
    dropped: int  # prompts without a reward: too long to be answered, or refused by the policy's or the reward model's chat template


class Level(Config):
    """One policy's answers."""

    reward: float  # mean over prompts of the mean reward of a prompt's answers
    stderr: float | None  # None of a single prompt
    characters: float  # mean over prompts, likewise
    truncated_share: float
    empty_share: float


class WinRate(Config):
    """Share of prompts whose answer has the higher reward than the baseline's; a tie is half a win."""

    value: float
    low: float
    high: float
    won: int
    tied: int
    lost: int
    method: str


class AlignmentResult(Config):
    """A prompt set under a reward model; without a baseline there is neither gain nor win rate."""

    name: str
    n: int
    dropped: int
    model: Level
    baseline: Level | None = None
    gain: Difference | None = None  # of the mean reward, model minus baseline
    win_rate: WinRate | None = None

    @property
    def flag(self) -> str | None:
        """Why the rewards may be of the limits and not of the policy, or None."""
        sides = [("model", self.model), *([("baseline", self.baseline)] if self.baseline else [])]
        flags = [
            f"limit: {side.truncated_share:.0%} of the {who}'s answers were ended by the token limit (answers.max_new_tokens)"
            for who, side in sides
            if side.truncated_share > MOST_UNUSABLE
        ]
        flags += [
            f"empty: {side.empty_share:.0%} of the {who}'s answers have no text"
            for who, side in sides
            if side.empty_share > MOST_UNUSABLE
        ]
        if self.dropped:
            flags.append(
                f"prompts: {self.dropped} were too long to be answered (answers.max_prompt_tokens) or refused by a chat template; "
                "dropped.jsonl of the answers and of their rewards says which"
            )
        return "; ".join(flags) or None


def read_answers(answers: Path, rewards: Path) -> Answers:
    """Read the artifacts of `generate` and of `score_rewards` on it."""
    texts = pq.read_table(answers / "responses.parquet", columns=["row_id", "responses", "truncated"]).to_pylist()
    scores = pq.read_table(rewards / "scores.parquet", columns=["row_id", "reward"]).to_pylist()
    cut = [flag for row in texts for flag in row["truncated"]]
    empty = [not text.strip() for row in texts for text in row["responses"]]
    return Answers(
        rewards={row["row_id"]: row["reward"] for row in scores},
        characters={row["row_id"]: [len(text) for text in row["responses"]] for row in texts},
        truncated_share=sum(cut) / len(cut),
        empty_share=sum(empty) / len(empty),
        dropped=int(json.loads((answers / "summary.json").read_text())["dropped"]) + len(texts) - len(scores),
    )


def measure(name: str, model: Answers, baseline: Answers | None) -> AlignmentResult:
    """Return the figures of a prompt set. Raises ValueError where the two did not answer the same prompts."""
    rows = sorted(model.rewards)
    level = AlignmentResult(name=name, n=len(rows), dropped=model.dropped, model=describe_level(model, rows))
    if baseline is None:
        return level
    if baseline.rewards.keys() != model.rewards.keys():
        unlike = len(baseline.rewards.keys() ^ model.rewards.keys())
        raise ValueError(
            f"{name}: both models must have answered the same prompts; {unlike} were answered by one of them only, and "
            f"{model.dropped} and {baseline.dropped} were too long for model and baseline, or refused by a chat template; raise "
            "answers.max_prompt_tokens, or look at dropped.jsonl"
        )
    own_N, base_N = (np.array([np.mean(side.rewards[row]) for row in rows]) for side in (model, baseline))
    return level.model_copy(
        update={
            "baseline": describe_level(baseline, rows),
            "gain": describe_difference(name, "model", own_N, base_N),
            "win_rate": measure_wins([(model.rewards[row], baseline.rewards[row]) for row in rows]),
        }
    )


def describe_level(answers: Answers, rows: list[str]) -> Level:
    """Return one policy's means over prompts."""
    reward_N = np.array([np.mean(answers.rewards[row]) for row in rows])
    return Level(
        reward=float(reward_N.mean()),
        stderr=float(reward_N.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else None,
        characters=float(np.mean([np.mean(answers.characters[row]) for row in rows])),
        truncated_share=answers.truncated_share,
        empty_share=answers.empty_share,
    )


def measure_wins(rewards: list[tuple[list[float], list[float]]]) -> WinRate:
    """Return the win rate over prompts with its interval. Of several answers a prompt gives the share of pairs won.

    With one answer each, won, tied and lost prompts are counts: the rate is 1/2 + (won - lost) / 2n, and its interval follows from
    Tango's of that difference, which knows ties and stays right at few prompts. Shares are bootstrapped by prompt.
    """
    win_N = np.array([win_share(np.asarray(own), np.asarray(base)) for own, base in rewards])
    n, won, lost = len(win_N), int((win_N > 0.5).sum()), int((win_N < 0.5).sum())
    if np.isin(win_N, (0, 0.5, 1)).all():
        ends = statistics.tango_interval(won, lost, n=n, confidence=CONFIDENCE)
        low, high, method = (1 + ends[0]) / 2, (1 + ends[1]) / 2, "Tango score interval"
    else:
        low, high = statistics.bootstrap_interval(win_N, np.arange(n), confidence=CONFIDENCE, seed=BOOTSTRAP_SEED)
        method = "bootstrap over prompts"
    return WinRate(
        value=float(win_N.mean()), low=low, high=high, won=won, tied=n - won - lost, lost=lost, method=method
    )


def win_share(own_K: Values, base_K: Values) -> float:
    """Return the share of pairs of answers to one prompt in which ours has the higher reward, ties counting half."""
    above_KK = own_K[:, None] > base_K
    equal_KK = own_K[:, None] == base_K
    return float((above_KK + equal_KK / 2).mean())
