"""An outside service: a server that speaks the OpenAI chat protocol on a real port, and judges by a rule that a test states."""

import itertools
import json
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

Messages = list[dict[str, str]]
ANSWERS = re.compile(
    r"<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>"
    r"|Assistant A's Answer\|>\n(.*)\n<\|The End of Assistant A.*Assistant B's Answer\|>\n(.*)\n<\|The End of Assistant B",
    re.DOTALL,
)


@dataclass(frozen=True)
class Refuse:
    """A status other than 200, with its words and headers."""

    status: int
    words: str = "no"
    headers: dict[str, str] = field(default_factory=dict)


class Hang(Exception):  # noqa: N818 - an order
    """Close the connection without a word."""


Rule = Callable[[Messages], "str | Refuse | bytes"]


def answers_of(messages: Messages) -> tuple[str, str]:
    """Return the two answers that a judge is shown, in their order."""
    found = ANSWERS.search(messages[1]["content"])
    assert found, messages
    first, second = (group for group in found.groups() if group is not None)
    return first, second


def prefer_longer(messages: Messages) -> str:
    """Say that the longer answer is better."""
    first, second = map(len, answers_of(messages))
    return f"Reasons. [[{'A>B' if first > second else 'B>A' if second > first else 'A=B'}]]"


def prefer_first(messages: Messages) -> str:
    """Say that the first answer is much better, whatever it is."""
    return "[[A>>B]]"


class StandardInput:
    """What a parent tells each of its children: key and address of a judge, a line each."""

    def __init__(self, *, key: str, url: str) -> None:
        self.lines = itertools.cycle([f"{key}\n", f"{url}\n"])

    def readline(self) -> str:
        return next(self.lines)


class ChatServer:
    """Answers `POST /v1/chat/completions` by its rule. `asked` are the requests that came, `answered` those it gave a verdict to."""

    def __init__(self, rule: Rule, *, certificate: Path | None = None) -> None:
        self.rule, self.model = rule, "judge-2026"
        self.asked: list[dict[str, Any]] = []
        self.answered: list[Messages] = []
        self.authorizations: set[str | None] = set()
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                """Write nothing."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Say nothing: a client that is killed or gives up resets its connections."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._server.server_port}/v1"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.asked.append(body)
            self.authorizations.add(handler.headers["Authorization"])
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            said: Any = (
                self.rule(body["messages"]) if handler.path == "/v1/chat/completions" else Refuse(404, "no such path")
            )
        except Hang:
            handler.close_connection = True
            return
        finally:
            with self._lock:
                self._now -= 1
        status, headers = (said.status, said.headers) if isinstance(said, Refuse) else (200, {})
        if isinstance(said, str):
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            said = json.dumps(
                {"object": "chat.completion", "model": self.model, "choices": [choice], "usage": usage}
            ).encode()
        data = said.words.encode() if isinstance(said, Refuse) else said
        if status == 200:
            with self._lock:
                self.answered.append(body["messages"])
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def stop(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
