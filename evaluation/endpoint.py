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

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tenacity.nap import sleep_using_event

from evaluation.calls import Answer, Call, Engine, Row, Score, Writing, run_pooled
from evaluation.config import Endpoint
from training.job import Interrupted

ATTEMPTS = 5  # of a request, over about eight seconds
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 300.0
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which the same request may be answered
REFUSED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
SHOWN_CHARS = 300
PORTS = {"http": 80, "https": 443}

Reply = dict[str, Any]


class EndpointFailed(RuntimeError):  # noqa: N818 - what the user reads
    """An endpoint gave no answer, however often it was asked."""


class EndpointEngine(Engine):
    """A served model, asked by so many requests at a time; the server makes its own batches and keeps its own prefixes."""

    batch_size = 1
    spare = -1  # a server writes a token after what it scores, for which there has to be room

    def __init__(self, endpoint: Endpoint, *, key: str, concurrency: int, stop: threading.Event) -> None:
        self.endpoint, self._key, self._stop = endpoint, key, stop
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="endpoint")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
            trust_env=False,  # a proxy would be another host
        )

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
        self._client.close()

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
        text = choice.get("text") or ""
        cut = choice.get("finish_reason") == "length" and not any(stop in text for stop in writing.stops)
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
        """Return the JSON object that a request is answered with, asked again with growing waits where that may help."""
        again = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential_jitter(initial=0.5, max=10),
            retry=retry_if_exception_type(EndpointFailed),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )
        reply: Reply = again(self._ask_once, method, path, **options)
        return reply

    def _ask_once(self, method: str, path: str, **options: Any) -> Reply:
        """Raise EndpointFailed for what may pass, LookupError for a path that is not there, ValueError for what stays refused."""
        if self._closed.is_set():
            raise Interrupted("benchmark")
        asked = f"endpoint {self.endpoint.url}: {method} {path}"
        try:
            response = self._client.request(method, self.endpoint.url.rstrip("/") + path, **options)
            said = f"HTTP {response.status_code}: {self._show(response.text)}"
        except httpx.TransportError as error:
            response, said = None, f"{type(error).__name__}: {error}"
        if response is None or response.status_code in PASSING:
            raise EndpointFailed(
                f"{asked} was asked {ATTEMPTS} times without an answer, last {said}; see that the server runs, and run the same command "
                "again to go on from the answers so far"
            )
        if response.status_code in REFUSED:
            raise ValueError(f"{asked} was refused, {said}; set VARFLOW_ENDPOINT_KEY to a key that it takes")
        if response.status_code == HTTPStatus.NOT_FOUND and method == "GET":
            raise LookupError(asked)
        if not response.is_success:
            raise ValueError(f"{asked} was refused, {said}; expected an answer; correct the endpoint or the benchmark")
        try:
            reply: Reply = response.json()
        except ValueError as error:
            raise ValueError(
                f"{asked} got {said}, expected JSON; correct endpoint.url, which mostly ends with /v1"
            ) from error
        return reply

    def _show(self, text: str) -> str:
        """Return the beginning of what a server said; it may have repeated the key."""
        shown = text.replace(self._key, "[key]") if self._key else text
        return " ".join(shown.split())[:SHOWN_CHARS]


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
