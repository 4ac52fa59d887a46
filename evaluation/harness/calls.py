"""What an engine is asked: rows of ids in batches, and what comes back. The same whoever computes it, and without torch.

All rows of a task are known before the first is answered, so a plan of batches does not depend on who answers them, nor on how
many do. A plan is carried out by one process, by several, or by a server.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any

from training.job import Interrupted

WORTHWHILE = 0.95  # a prefix is shared where the tokens read fall below this share of those of whole prompts
POLL_SECONDS = 0.2  # between two looks for a stop request

Score = tuple[float, bool]  # log-probability in nats, summed; whether each token is the likeliest


@dataclass(frozen=True)
class Row:
    """One sequence to read. What it is to say comes after it, or `endings` are scored, which differ in their last id alone.

    With endings the ids are a prompt and any of them but for its last id.
    """

    ids: list[int]
    endings: tuple[tuple[int, ...], ...] = ()
    task: str | None = None  # rows of a task may share a prefix; None: with nobody

    @property
    def tail(self) -> int:
        """How many of the last positions predict something that is wanted."""
        return max(map(len, self.endings), default=1)


@dataclass(frozen=True)
class Group:
    """Batches of rows, by index, that all begin with the same `prefix` ids, which are read once."""

    prefix: list[int]
    batches: list[list[int]]


@dataclass(frozen=True)
class Writing:
    """How rows are written on: greedily, at most `limit` tokens, to the first of the stop strings."""

    limit: int
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What was written after a row, special tokens left out, and whether it met a stop before the limit."""

    text: str
    stopped: bool


ENDED = ("stop", "length")  # why a whole answer ends; any other reason is of one that was broken off


@dataclass(frozen=True)
class Call:
    """One batch, to be answered at once: all that another process has to know. Without `writing`, endings are scored."""

    rows: list[Row]
    prefix: list[int]
    writing: Writing | None


class Engine(ABC):
    """What answers rows: a model in this process, copies of it in others, a server."""

    batch_size: int
    shares_reading = False  # whether a prefix that rows share is read once, when endings are scored
    shares_writing = False  # and when rows are written on
    spare = 1  # ids that a row with its ending may have above the context: the last id of an ending is not read

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[Score]]]:
        """Yield (index, a score for each ending) of every row, batch by batch."""
        return self._answer(rows, share=self.shares_reading, writing=None)

    def write(self, rows: Sequence[Row], *, limit: int, stops: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Yield (index, answer) of every row, batch by batch."""
        return self._answer(rows, share=self.shares_writing, writing=Writing(limit, tuple(stops)))

    def _answer(self, rows: Sequence[Row], *, share: bool, writing: Writing | None) -> Iterator[tuple[int, Any]]:
        groups = plan_groups(rows, batch_size=self.batch_size, share=share)
        batches = [(group.prefix, batch) for group in groups for batch in group.batches]
        calls = [Call([rows[index] for index in batch], prefix, writing) for prefix, batch in batches]
        for number, answers in self.run(calls):
            yield from zip(batches[number][1], answers, strict=True)

    @abstractmethod
    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (number, a list of scores or an answer for each row) of every call as it is done."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what was started for this engine alone."""


def plan_groups(rows: Sequence[Row], *, batch_size: int, share: bool) -> list[Group]:
    """Return every row in one batch: those of a task by themselves where reading their prefix once saves tokens, else all pooled.

    Rows are batched longest first, those of equal length in the order of their ids, as stock does.
    """
    tasks: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        if share and row.task is not None:
            tasks.setdefault(row.task, []).append(index)
    groups, pooled = [], {index for index in range(len(rows))}
    for members in tasks.values():
        shared = common_prefix([rows[index] for index in members])
        batches = batch_rows(rows, members, batch_size=batch_size)
        if count_tokens(rows, batches, shared=shared) < WORTHWHILE * sum(len(rows[index].ids) for index in members):
            groups.append(Group(prefix=rows[members[0]].ids[:shared], batches=batches))
            pooled -= set(members)
    return [*groups, Group(prefix=[], batches=batch_rows(rows, sorted(pooled), batch_size=batch_size))]


def common_prefix(rows: Sequence[Row]) -> int:
    """Return how many ids all rows begin with, short of any position whose logits are wanted."""
    longest = min(len(row.ids) - row.tail for row in rows)
    first, last = (
        min(row.ids for row in rows),
        max(row.ids for row in rows),
    )  # in order of ids, the two that differ soonest
    differs = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return max(0, min(longest, next(differs, longest)))


def batch_rows(rows: Sequence[Row], members: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """Return the members in batches, longest first."""
    order = sorted(members, key=lambda index: (-len(rows[index].ids), rows[index].ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def count_tokens(rows: Sequence[Row], batches: Sequence[Sequence[int]], *, shared: int) -> int:
    """Return the tokens that are read, padding included, with the first `shared` of each row read once."""
    return shared + sum(len(batch) * (max(len(rows[index].ids) for index in batch) - shared) for batch in batches)


def run_pooled(
    pool: Executor, work: Callable[[Any], Any], items: Sequence[Any], *, stop: threading.Event
) -> Iterator[tuple[int, Any]]:
    """Start `work` on every item, and return an iterator over (number, what it made of it), as they are done, in no order."""
    return collect({pool.submit(work, item): number for number, item in enumerate(items)}, stop=stop)


def collect(numbers: dict[Future[Any], int], *, stop: threading.Event) -> Iterator[tuple[int, Any]]:
    """Yield (number, result) of futures as they are done.

    What is done is yielded before what failed is raised, and then nothing more is started. Interrupted soon after `stop` is set.
    """
    left = set(numbers)
    try:
        while left:
            if stop.is_set():
                raise Interrupted("benchmark")
            done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):
                yield numbers[future], future.result()
    finally:
        for future in left:
            future.cancel()
