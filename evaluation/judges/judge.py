"""A judge of answers: every pair in both orders, each call once, within a budget, resumed after any end.

A backend answers conversations and knows nothing of pairs. What it answered is a line in a file before anything is made of it, keyed by
the judge's identity and the exact messages, so that a second start asks only what was not answered.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from evaluation.judges.config import JudgeConfig, JudgeRuntime
from evaluation.judges.prompt import Conversation, JudgePrompt
from evaluation.responses import Responses, hash_json
from training.metrics import MetricsWriter

MOST_REFUSED = 10  # calls, while fewer than that were answered: then it is the request that is wrong, not some prompt
PROGRESS_SECONDS = 1.0
CALL = "judge"  # kind of a request in the file of answers

Order = Literal["ours_first", "theirs_first"]
ORDERS: tuple[Order, Order] = ("ours_first", "theirs_first")
Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one question. `cluster` names what was drawn: verdicts on one cluster are not independent."""

    id: str
    group: str
    cluster: str
    question: str
    ours: str
    theirs: str
    ours_cut: bool = False  # ended by the token limit of whoever answered, where that is known
    theirs_cut: bool = False


@dataclass(frozen=True)
class Reply:
    """What a judge said. `refused` is an endpoint's refusal of this one request; its words are the text, and it is never kept."""

    text: str
    finish: Finish
    served: str  # the model that answered, by its own word
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.answer_tokens


class Backend(Protocol):
    """What answers conversations. Whatever is not runtime is in its identity."""

    name: str
    identity: dict[str, Any]

    def answer(self, conversations: Iterator[tuple[int, Conversation]]) -> Generator[tuple[int, Reply]]:
        """Yield (number, reply) of each conversation as they come, taking the next one only when there is room for it.

        Raises JudgeFailed when it cannot go on, and Interrupted when it was asked to stop, after yielding what came in time.
        """


class JudgeFailed(Exception):  # noqa: N818 - what the user reads
    """A judge cannot go on. What it answered is kept."""


class BudgetReached(ValueError):  # noqa: N818 - what the user reads
    """A judge may take no more calls or tokens. What it answered is kept."""


@dataclass
class Judgement:
    """One order of one pair: what was said, and what it means."""

    pair: Pair
    order: Order
    repeat: int
    conversation: Conversation
    margin: int | None = None  # of ours, from -2 to 2; None while there is no verdict
    replies: list[Reply] = field(default_factory=list)

    @property
    def first_ahead(self) -> int | None:
        """The margin of the answer that was shown first."""
        return None if self.margin is None else self.margin if self.order == "ours_first" else -self.margin


class Caller:
    """Asks a backend, each call once: what is known comes from the file, what is new goes into it."""

    def __init__(
        self, backend: Backend, *, calls: Responses, runtime: JudgeRuntime, metrics: MetricsWriter, total: int
    ) -> None:
        self.backend = backend
        self.used: set[str] = set()  # keys: a call that two requests share is one
        self.tokens = 0  # of all of them
        self.asked = 0  # of the used ones, those that were answered now
        self.refused = 0
        self._calls, self._runtime = calls, runtime
        self._metrics, self._total, self._written = metrics, total, 0.0

    def ask(self, requests: Sequence[tuple[Conversation, int]]) -> list[Reply]:
        """Return the replies to (conversation, repeat). Raises BudgetReached, JudgeFailed and what stops the backend."""
        keys = [hash_json(request) for request in requests]
        told: dict[str, Reply] = {}
        for key, request in zip(keys, requests, strict=True):
            known = self._calls.get(CALL, request)
            if known is not None:
                told[key] = self._use(key, Reply(**known))
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in told}
        order = list(new)
        self._tell()
        try:
            with closing(self.backend.answer(self._within_budget([new[key] for key in order]))) as replies:
                for number, reply in replies:
                    told[order[number]] = reply
                    self._keep(order[number], new[order[number]], reply)
        except JudgeFailed as failure:
            raise JudgeFailed(
                f"{failure}; {self._describe(told, len(set(keys)))}; run the same again to go on"
            ) from failure
        finally:
            self._tell()
        if len(told) < len(set(keys)):
            raise BudgetReached(
                f"judge {self.backend.name}: the budget is spent, {len(self.used)} calls of {self._runtime.max_calls or 'any number'} and "
                f"{self.tokens} tokens of {self._runtime.max_tokens or 'any number'}; {self._describe(told, len(set(keys)))}; raise "
                "runtime.max_calls or runtime.max_tokens and run the same again to go on"
            )
        return [told[key] for key in keys]

    def _keep(self, key: str, request: tuple[Conversation, int], reply: Reply) -> None:
        if reply.finish == "refused":
            self.refused += 1
            if self.refused >= MOST_REFUSED and self.refused > len(self.used):
                raise JudgeFailed(
                    f"judge {self.backend.name}: {self.refused} requests were refused; the last one: {reply.text}"
                )
            return
        if self._runtime.max_tokens is not None and reply.tokens == 0:
            raise JudgeFailed(
                f"judge {self.backend.name}: it does not say how many tokens a call takes, so runtime.max_tokens cannot be kept; set "
                "runtime.max_calls instead"
            )
        self._calls.add(CALL, request, asdict(reply))
        self._use(key, reply)
        self.asked += 1
        if time.monotonic() - self._written > PROGRESS_SECONDS:
            self._tell()

    def _use(self, key: str, reply: Reply) -> Reply:
        if key not in self.used:
            self.used.add(key)
            self.tokens += reply.tokens
        return reply

    def _within_budget(self, requests: list[tuple[Conversation, int]]) -> Iterator[tuple[int, Conversation]]:
        """Yield what is to be asked, numbered, for as long as the budget lasts."""
        begun = len(self.used)
        for number, (conversation, _) in enumerate(requests):
            spent = self._runtime.max_tokens is not None and self.tokens >= self._runtime.max_tokens
            if spent or (self._runtime.max_calls is not None and begun + number >= self._runtime.max_calls):
                return
            yield number, conversation

    def _describe(self, told: Mapping[str, Reply], total: int) -> str:
        return f"{len(told.keys() & self.used)} of {total} calls of this round are answered and kept"

    def _tell(self) -> None:
        self._written = time.monotonic()
        figures = {"judge/calls": float(len(self.used)), "judge/tokens": float(self.tokens)}
        self._metrics.write(min(len(self.used), self._total), figures)


def judge_pairs(pairs: Sequence[Pair], *, prompt: JudgePrompt, config: JudgeConfig, caller: Caller) -> list[Judgement]:
    """Return a judgement for each pair, order and repeat. One without a verdict was asked again `format_retries` times."""
    judgements = [
        Judgement(pair, order, repeat, prompt.ask(pair.question, *in_order(pair, order)))
        for pair in pairs
        for order in ORDERS
        for repeat in range(config.repeats)
    ]
    waiting = judgements
    for _ in range(1 + config.format_retries):
        if not waiting:
            break
        replies = caller.ask([(judgement.conversation, judgement.repeat) for judgement in waiting])
        for judgement, reply in zip(waiting, replies, strict=True):
            take(judgement, reply, prompt=prompt)
        waiting = [j for j in waiting if j.margin is None and j.replies[-1].finish != "refused"]
    return judgements


def in_order(pair: Pair, order: Order) -> tuple[str, str]:
    """Return the answers as they are shown."""
    return (pair.ours, pair.theirs) if order == "ours_first" else (pair.theirs, pair.ours)


def take(judgement: Judgement, reply: Reply, *, prompt: JudgePrompt) -> None:
    """Take a reply into a judgement: its verdict, or the conversation that asks for one.

    A reply that the cap ended gives none: a label in it may be one that its reasons were about to leave.
    """
    judgement.replies.append(reply)
    ahead = prompt.read(reply.text) if reply.finish == "stop" else None
    if ahead is None:
        judgement.conversation = prompt.ask_again(judgement.conversation, reply.text)
    else:
        judgement.margin = ahead if judgement.order == "ours_first" else -ahead


def count_served(judgements: Sequence[Judgement]) -> Counter[str]:
    """Return how many replies each model gave that answered under the judge's name."""
    return Counter(reply.served for judgement in judgements for reply in judgement.replies if reply.served)
