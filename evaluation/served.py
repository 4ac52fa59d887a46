"""An OpenAI-compatible server, asked over HTTP: again while it may still answer, no longer where it has said that it will not."""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx
import tenacity

from training.job import Interrupted

ANSWER_SECONDS, CONNECT_SECONDS = 300.0, 10.0  # a long answer of a loaded server takes minutes
LONGEST_PAUSE_SECONDS = 30.0  # unless the server asks for more
SHOWN_CHARS = 300  # of what a server says of a failure
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses after which the same request may be answered
UNREADABLE = (KeyError, IndexError, TypeError, AttributeError, ValueError)

Stop = Callable[[tenacity.RetryCallState], bool]


class Unanswered(Exception):  # noqa: N818 - an event: the same request may be answered later
    """A request was not answered, after so many `attempts`. `wait_seconds` is how long the server asks to wait."""

    attempts = 1

    def __init__(self, words: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(words)
        self.wait_seconds = wait_seconds


class Refused(ValueError):  # noqa: N818 - what the user reads
    """A request was answered with a status that stays."""

    def __init__(self, words: str, *, status: int) -> None:
        super().__init__(words)
        self.status = status


class Server:
    """One server, for any number of threads. Whatever it says is shown without the key, which some repeat.

    `stop` ends the patience with a request, `halted` all requests that are not under way.
    """

    def __init__(self, url: str, *, key: str, connections: int, stop: Stop, halted: threading.Event) -> None:
        try:
            authorities = httpx.create_ssl_context()
        except OSError as error:
            raise ValueError(
                f"SSL_CERT_FILE or SSL_CERT_DIR: {error}; expected certificates in PEM format; correct it, or unset it"
            ) from None
        self._key, self._stop, self._halted = key, stop, halted
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=connections),
            verify=authorities,
            trust_env=False,  # a proxy would be another host
        )

    def ask(self, method: str, path: str, *, read: Callable[[Any], Any] = dict, **options: Any) -> Any:
        """Return what `read` makes of the JSON that a request is answered with; what it cannot read may pass, too.

        Raises Unanswered, Refused, LookupError for a page that is not there, Interrupted once `halted` is set.
        """
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unanswered),
            wait=choose_pause,
            stop=self._stop,
            sleep=tenacity.sleep_using_event(self._halted),
            reraise=True,
        )
        try:
            return again(self._ask_once, method, path, read, **options)
        except Unanswered as error:
            error.attempts = again.statistics["attempt_number"]
            raise

    def _ask_once(self, method: str, path: str, read: Callable[[Any], Any], **options: Any) -> Any:
        if self._halted.is_set():  # perhaps woken from its pause to end
            raise Interrupted(path)
        try:
            response = self._client.request(method, path, **options)
        except httpx.RequestError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ValueError(
                    f"{self._client.base_url.host}: {self._show(str(error))}; set SSL_CERT_FILE to the certificate of the authority that "
                    "signed the server's"
                ) from None
            raise Unanswered(f"{type(error).__name__}: {self._show(str(error))}") from None
        status, said = response.status_code, self._show(response.text)
        if status in PASSING:
            wait_seconds = read_wait(response.headers.get("retry-after"))
            asks = f", which asks to wait {wait_seconds:.0f} s" if wait_seconds else ""
            raise Unanswered(f"status {status}{asks}: {said}", wait_seconds=wait_seconds)
        if status == HTTPStatus.NOT_FOUND and method == "GET":
            raise LookupError(path)
        if not response.is_success:
            raise Refused(f"status {status}: {said}", status=status)
        try:
            return read(response.json())
        except UNREADABLE:
            raise Unanswered(f"not the JSON that was expected: {said!r}") from None

    def _show(self, words: str) -> str:
        """Return the beginning of what was said; the key goes first, or a part of it might be left at the end."""
        shown = words.replace(self._key, "[key]") if self._key else words
        return " ".join(shown.split())[:SHOWN_CHARS]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def choose_pause(state: tenacity.RetryCallState) -> float:
    """Return the seconds before the next try: what the server asks for, else random and growing."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_seconds if isinstance(error, Unanswered) else None
    growing = tenacity.wait_exponential_jitter(initial=0.5, max=LONGEST_PAUSE_SECONDS)
    return growing(state) if asked is None else asked


def read_wait(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms; None for none that can be read."""
    with suppress(ValueError):
        return max(0.0, float(header or ""))
    with suppress(ValueError, TypeError):  # a date without its zone cannot be compared
        return max(0.0, (parsedate_to_datetime(header or "") - datetime.now(UTC)).total_seconds())
    return None
