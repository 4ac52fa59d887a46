"""A model behind an OpenAI-compatible `/completions`, sent the ids that a model here would read.

Prompts are rendered and turned into ids on this side, by the tokenizer of a local folder, so that they are those of the other
backends. Endings are scored by `echo` with `logprobs`, which vLLM and others offer and most public ones do not. What is served
cannot be proven: its name, and the one that the server gives, are told as they are.
"""

import difflib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from tenacity import RetryCallState

from evaluation.config import Endpoint
from evaluation.harness.calls import ENDED, Answer, Call, Engine, Row, Score, Writing, run_pooled
from evaluation.served import Refused, Server, Unanswered

ATTEMPTS = 5  # of a request, over about eight seconds
MOST_WAIT_SECONDS = 120.0  # that a server may ask for
KEY_REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
PORTS = {"http": 80, "https": 443}

Reply = dict[str, Any]


class EndpointFailed(RuntimeError):  # noqa: N818 - what the user reads
    """An endpoint gave no answer, however often it was asked."""


class EndpointEngine(Engine):
    """A served model, asked by so many requests at a time; the server makes its own batches and keeps its own prefixes."""

    batch_size = 1
    spare = -1  # a server writes a token after what it scores, for which there has to be room

    def __init__(self, endpoint: Endpoint, *, key: str, concurrency: int, stop: threading.Event) -> None:
        self.endpoint, self._stop = endpoint, stop
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="endpoint")
        self._server = Server(endpoint.url, key=key, connections=concurrency, stop=gives_up, halted=self._closed)

    def check(self, ids: list[int], *, scored: Sequence[str]) -> str | None:
        """Return the name that the server gives its model. ValueError where it cannot do what the tasks need.

        `ids` are any few, `scored` the tasks that need log-probabilities of their prompts.
        """
        self._check_name()
        reply = self._complete(ids, max_tokens=1, **({"echo": True, "logprobs": 1} if scored else {}))
        if scored:
            read_logprobs(reply, ids, tasks=scored, url=self.endpoint.url)
        reported = reply.get("model")
        return None if reported is None else str(reported)

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (number, answers) of calls as they are done. EndpointFailed when one is not answered however often it is asked."""
        return run_pooled(self._pool, self._answer_call, calls, stop=self._stop)

    def close(self) -> None:
        """Ask nothing more."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()

    def _answer_call(self, call: Call) -> list[Any]:
        if call.writing is None:
            return [[self._score(row, ending) for ending in row.endings] for row in call.rows]
        return [self._write(row, call.writing) for row in call.rows]

    def _score(self, row: Row, ending: tuple[int, ...]) -> Score:
        ids = [*row.ids, ending[-1]]
        reply = self._complete(ids, max_tokens=1, echo=True, logprobs=1)
        logps, likeliest = read_logprobs(reply, ids, tasks=[row.task or ""], url=self.endpoint.url)
        ours = slice(len(ids) - len(ending), len(ids))
        return sum(logps[ours]), logps[ours] == likeliest[ours]

    def _write(self, row: Row, writing: Writing) -> Answer:
        reply = self._complete(row.ids, max_tokens=writing.limit, stop=list(writing.stops))
        choice = read_choice(reply, url=self.endpoint.url)
        text, reason = choice.get("text"), choice.get("finish_reason")
        if reason not in ENDED or not isinstance(text, str):
            raise EndpointFailed(
                f"endpoint {self.endpoint.url}: broke off an answer of {row.task or 'a task'}: finish_reason {reason!r}, "
                f"{'a text' if isinstance(text, str) else 'no text'}; expected a text that ends by {' or '.join(ENDED)}; nothing was scored for "
                "it: see the server's log, and run the same command again to go on from the answers so far"
            )
        cut = reason == "length" and not any(stop in text for stop in writing.stops)
        return Answer(text, stopped=not cut)

    def _complete(self, ids: list[int], **how: Any) -> Reply:
        return self._ask(
            "POST", "/completions", json={"model": self.endpoint.model, "prompt": ids, "temperature": 0} | how
        )

    def _check_name(self) -> None:
        """Refuse a model that the server says it does not have."""
        try:
            listed = self._ask("GET", "/models").get("data") or []
        except LookupError:  # it lists none
            return
        names = [str(each.get("id")) for each in listed]
        if names and self.endpoint.model not in names:
            near = difflib.get_close_matches(self.endpoint.model, names, n=3) or names[:3]
            raise ValueError(
                f"endpoint {self.endpoint.url}: serves no model {self.endpoint.model!r}; expected one of its {len(names)}, nearest: "
                f"{', '.join(near)}; correct endpoint.model"
            )

    def _ask(self, method: str, path: str, **options: Any) -> Reply:
        """Return the JSON object that a request is answered with. LookupError for a page that is not there."""
        asked = f"endpoint {self.endpoint.url}: {method} {path}"
        try:
            reply: Reply = self._server.ask(method, path, **options)
        except Unanswered as error:
            raise EndpointFailed(
                f"{asked} was asked {error.attempts} times without an answer, last {error}; see that the server runs and that endpoint.url, "
                "which mostly ends with /v1, is right, and run the same command again to go on from the answers so far"
            ) from None
        except Refused as error:
            key = "set VARFLOW_ENDPOINT_KEY to a key that it takes"
            advice = key if error.status in KEY_REFUSED else "correct the endpoint or the benchmark"
            raise ValueError(f"{asked} was refused, {error}; {advice}") from None
        return reply


def gives_up(state: RetryCallState) -> bool:
    """Tell whether a server was asked often enough, or asks to wait for too long."""
    return state.attempt_number >= ATTEMPTS or state.upcoming_sleep > MOST_WAIT_SECONDS


def locate(endpoint: Endpoint) -> tuple[str, int]:
    """Return host and port of an endpoint."""
    parts = urlsplit(endpoint.url)
    return parts.hostname or "", parts.port or PORTS[parts.scheme]


def read_choice(reply: Reply, *, url: str) -> Reply:
    """Return the one choice of a reply."""
    choices = reply.get("choices") or []
    if len(choices) != 1:
        raise ValueError(
            f"endpoint {url}: a completion has {len(choices)} choices, expected 1; it is not OpenAI-compatible"
        )
    choice: Reply = choices[0]
    return choice


def read_logprobs(reply: Reply, ids: list[int], *, tasks: Sequence[str], url: str) -> tuple[list[float], list[float]]:
    """Return (log-probability of each id, that of the likeliest one there) in nats, of a prompt that was echoed.

    The first id has none. ValueError for a server that does not echo, or does not tell them.
    """
    told = read_choice(reply, url=url).get("logprobs") or {}
    logps, tops = told.get("token_logprobs") or [], told.get("top_logprobs") or []
    if min(len(logps), len(tops)) < len(ids) or None in logps[1 : len(ids)]:
        raise ValueError(
            f"endpoint {url}: gave {len(logps)} log-probabilities for a prompt of {len(ids)} tokens, expected one each (echo with logprobs), "
            f"which {', '.join(tasks)} need; serve the model with vLLM, or take these tasks out of the suite"
        )
    return logps[: len(ids)], [max(top.values()) if top else 0.0 for top in tops[: len(ids)]]
