"""A judge behind an OpenAI-compatible chat endpoint: bounded threads, patience with a busy server, no waiting for what will not change.

Address and key come from two variables that the parent sets for this child alone. The key is in no file, no log and no message:
whatever the endpoint says is shown without it.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from evaluation.judge import Conversation, Finish, JudgeFailed, Reply
from evaluation.judge_config import EndpointJudge, JudgeConfig, JudgeRuntime
from training.job import Interrupted

READ_SECONDS, CONNECT_SECONDS = 300.0, 10.0  # a long answer of a loaded server takes minutes
LONGEST_PAUSE_SECONDS = 30.0
POLL_SECONDS = 0.1
DRAIN_SECONDS = 10.0  # what is under way may still be answered; below the time that the parent gives a child to end
WORDS_CHARS = 300  # of what an endpoint says of a failure
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
REFUSED = {400, 413, 422}  # this one request: too long for the model, or against the rules of whoever runs it


class EndpointSettings(BaseSettings):
    """What the parent puts into this child's environment, and nowhere else."""

    model_config = SettingsConfigDict(env_prefix="VARFLOW_JUDGE_", extra="ignore", hide_input_in_errors=True)

    url: str
    api_key: SecretStr | None = None


class Busy(Exception):  # noqa: N818 - an event: the same call may be answered later
    """A call was not answered. `wait_seconds` is how long the server asks to wait."""

    def __init__(self, words: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(words)
        self.wait_seconds = wait_seconds


class JudgeEndpoint:
    """The judge as a backend. Use it until its last conversation is answered, then close it."""

    def __init__(
        self, judge: EndpointJudge, *, config: JudgeConfig, runtime: JudgeRuntime, check_stop: Callable[[], None]
    ) -> None:
        settings = EndpointSettings()
        self.name = f"{judge.model}@{judge.revision}"
        self.identity = judge.model_dump(mode="json") | {"max_answer_tokens": config.max_answer_tokens}
        self._request = {
            "model": judge.model,
            "temperature": judge.temperature,
            "max_tokens": config.max_answer_tokens,
        }
        self._key = settings.api_key.get_secret_value() if settings.api_key else ""
        self._runtime, self._check_stop = runtime, check_stop
        self._client = httpx.Client(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=runtime.concurrency),
        )

    def answer(self, conversations: Iterator[tuple[int, Conversation]]) -> Generator[tuple[int, Reply]]:
        """Yield replies as they come; see `evaluation.judge.Backend`."""
        results: queue.SimpleQueue[tuple[int, Reply] | Exception | None] = queue.SimpleQueue()
        halted, turn = threading.Event(), threading.Lock()

        def work() -> None:
            try:
                while not halted.is_set():
                    with turn:
                        item = next(conversations, None)
                    if item is None:
                        break
                    results.put((item[0], self._call(item[1], halted)))
            except Exception as error:  # noqa: BLE001 - carried to the thread that asked
                results.put(error)
            results.put(None)

        # daemons: a process that was told to end does not wait minutes for an answer
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._runtime.concurrency)]
        for thread in threads:
            thread.start()
        try:
            yield from self._collect(results, workers=len(threads), halted=halted)
        finally:
            halted.set()

    def _collect(self, results: Any, *, workers: int, halted: threading.Event) -> Generator[tuple[int, Reply]]:
        """Yield what the workers bring; after a failure or a request to stop, only what still comes within a few seconds."""
        failure: Exception | None = None
        deadline = 0.0
        while workers and (failure is None or time.monotonic() < deadline):
            try:
                found = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                found = ...
            if found is None:
                workers -= 1
            elif isinstance(found, tuple):
                yield found
            reason = self._asked_to_stop() or (found if isinstance(found, Exception) else None)
            if failure is None and reason is not None:
                failure, deadline = reason, time.monotonic() + DRAIN_SECONDS
                halted.set()
        if failure is not None:
            raise failure

    def _asked_to_stop(self) -> Exception | None:
        try:
            self._check_stop()
        except Interrupted as stop:
            return stop
        return None

    def _call(self, conversation: Conversation, halted: threading.Event) -> Reply:
        """Return the reply to one conversation, tried again while the endpoint may still answer."""
        patience = self._runtime.patience_seconds
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Busy),
            wait=choose_pause,
            stop=tenacity.stop_before_delay(patience) | tenacity.stop_when_event_set(halted),
            sleep=tenacity.sleep_using_event(halted),
            reraise=True,
        )

        def post() -> Reply:
            if halted.is_set():  # woken from its pause to end
                raise Busy("stopped")
            return self._post(conversation)

        try:
            return again(post)
        except Busy as busy:
            asked = f", and asks to wait {busy.wait_seconds:.0f} s" if busy.wait_seconds else ""
            raise JudgeFailed(
                f"judge {self.name}: the endpoint {self._client.base_url.host} did not answer within {patience:g} s "
                f"(runtime.patience_seconds){asked}: {busy}"
            ) from None

    def _post(self, conversation: Conversation) -> Reply:
        try:
            response = self._client.post("chat/completions", json=self._request | {"messages": conversation})
        except httpx.RequestError as error:
            raise Busy(f"{type(error).__name__}: {error}") from None
        said = self._hide(response.text)[:WORDS_CHARS]
        words = f"status {response.status_code}: {said}"
        if response.status_code in TRY_AGAIN:
            raise Busy(words, wait_seconds=read_wait(response.headers.get("retry-after")))
        if response.status_code in REFUSED:
            return Reply(words, "refused", "", 0, 0)
        if response.status_code != httpx.codes.OK:
            raise JudgeFailed(
                f"judge {self.name}: the endpoint {self._client.base_url.host} refuses: {words}; check "
                "VARFLOW_JUDGE_URL, VARFLOW_JUDGE_API_KEY and the judge's name"
            )
        reply = read_reply(response)
        if reply is None:
            raise Busy(f"no chat completion: {said!r}")
        return reply

    def _hide(self, words: str) -> str:
        """Return words of the endpoint without the key, which some servers repeat."""
        return words.replace(self._key, "***") if self._key else words

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def choose_pause(state: tenacity.RetryCallState) -> float:
    """Return the seconds before the next try: what the server asks for, else random and growing."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Busy) and error.wait_seconds is not None:
        return error.wait_seconds
    return tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_SECONDS)(state)


def read_wait(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms; None for none that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # a date without its zone cannot be compared
        return None


def read_reply(response: httpx.Response) -> Reply | None:
    """Return what a chat completion says, None for what is none. An answer without text is an empty one."""
    try:
        said = response.json()
        choice = said["choices"][0]
        text = choice["message"].get("content") or ""
        usage = said.get("usage") or {}
        finish: Finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return Reply(
            text=str(text),
            finish=finish,
            served=str(said.get("model") or ""),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            answer_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return None
