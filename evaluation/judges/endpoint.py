"""A judge behind an OpenAI-compatible chat endpoint: bounded threads, and all that was answered is kept, whatever ends it."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

import tenacity

from evaluation.judges.config import EndpointJudge, JudgeConfig, JudgeRuntime
from evaluation.judges.judge import Conversation, Finish, JudgeFailed, Reply
from evaluation.served import Refused, Server, Unanswered
from training.job import Interrupted

POLL_SECONDS = 0.1
DRAIN_SECONDS = 10.0  # what is under way may still be answered; below the time that the parent gives a child to end
REFUSED = {400, 413, 422}  # this one request: too long for the model, or against the rules of whoever runs it
REMEDIES = {  # of OpenAI's reasoning models: https://platform.openai.com/docs/api-reference/chat/create
    "temperature": "set judging.judge.temperature to one that it takes, such as 1",
    "max_tokens": "set runtime.cap_parameter to max_completion_tokens",
    "max_completion_tokens": "set runtime.cap_parameter to max_tokens",
}


class JudgeEndpoint:
    """The judge as a backend. Use it until its last conversation is answered, then close it."""

    def __init__(
        self,
        judge: EndpointJudge,
        *,
        url: str,
        key: str,
        config: JudgeConfig,
        runtime: JudgeRuntime,
        check_stop: Callable[[], None],
    ) -> None:
        self.name = f"{judge.model}@{judge.revision}"
        self.identity = judge.model_dump(mode="json") | {"max_answer_tokens": config.max_answer_tokens}
        self._request = {
            "model": judge.model,
            "temperature": judge.temperature,
            runtime.cap_parameter: config.max_answer_tokens,
        }
        self._runtime, self._check_stop, self._halted = runtime, check_stop, threading.Event()
        self._where = f"judge {self.name}: the endpoint {urlsplit(url).hostname}"
        stop = tenacity.stop_before_delay(runtime.patience_seconds)
        self._server = Server(url, key=key, connections=runtime.concurrency, stop=stop, halted=self._halted)

    def answer(self, conversations: Iterator[tuple[int, Conversation]]) -> Generator[tuple[int, Reply]]:
        """Yield replies as they come; see `evaluation.judges.judge.Backend`."""
        results: queue.SimpleQueue[tuple[int, Reply] | Exception | None] = queue.SimpleQueue()
        turn = threading.Lock()

        def work() -> None:
            try:
                while not self._halted.is_set():
                    with turn:
                        item = next(conversations, None)
                    if item is None:
                        break
                    results.put((item[0], self._call(item[1])))
            except Exception as error:  # noqa: BLE001 - carried to the thread that asked
                results.put(error)
            results.put(None)

        # daemons: a process that was told to end does not wait minutes for an answer
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._runtime.concurrency)]
        for thread in threads:
            thread.start()
        try:
            yield from self._collect(results, workers=len(threads))
        except BaseException:
            self._halted.set()
            raise

    def _collect(self, results: Any, *, workers: int) -> Generator[tuple[int, Reply]]:
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
                self._halted.set()
        if failure is not None:
            raise failure

    def _asked_to_stop(self) -> Exception | None:
        try:
            self._check_stop()
        except Interrupted as stop:
            return stop
        return None

    def _call(self, conversation: Conversation) -> Reply:
        """Return the reply to one conversation, tried again while the endpoint may still answer."""
        body = self._request | {"messages": conversation}
        try:
            reply: Reply = self._server.ask("POST", "/chat/completions", read=read_reply, json=body)
        except Unanswered as error:
            patience = f"{self._runtime.patience_seconds:g} s (runtime.patience_seconds)"
            raise JudgeFailed(f"{self._where} did not answer within {patience}: {error}") from None
        except Refused as refusal:
            if refusal.status in REFUSED:
                self._check_parameters(str(refusal))
                return Reply(str(refusal), "refused", "", 0, 0)
            raise JudgeFailed(
                f"{self._where} refuses: {refusal}; check VARFLOW_JUDGE_URL, VARFLOW_JUDGE_API_KEY and the judge's name"
            ) from None
        return reply

    def _check_parameters(self, refusal: str) -> None:
        """Raise JudgeFailed where it is a parameter that is refused: it would be with every conversation."""
        for parameter, remedy in REMEDIES.items():
            if parameter in self._request and f"'{parameter}'" in refusal and "unsupported" in refusal.lower():
                raise JudgeFailed(f"{self._where} refuses {parameter}: {refusal}; {remedy}")

    def close(self) -> None:
        """Close the connections."""
        self._server.close()


def read_reply(said: Any) -> Reply:
    """Return what a chat completion says; KeyError and the like for what is none. An answer without text is an empty one."""
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
