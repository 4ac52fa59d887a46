"""JSON over HTTP to the servers of the stack: enough to ask after their health before any library of theirs is loaded."""

import json
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

ANSWER_SECONDS = 5.0
BUSY_PAUSES = (0.2, 0.5, 1.0)  # seconds; Prefect says 503 where another writer had its database for too long

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows no loopback of ours


class NoAnswer(Exception):  # noqa: N818 - a state, told as the reason
    """The server did not answer, or answered with an error: `status` is the HTTP status, None without one."""

    def __init__(self, reason: str, *, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET a URL, or POST a JSON body to it, and return the decoded answer (the text where it is not JSON).

    A server that says that it is busy is asked again, a few times.
    """
    for pause in BUSY_PAUSES:
        try:
            return _ask(url, body)
        except NoAnswer as error:
            if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
        time.sleep(pause)
    return _ask(url, body)


def _ask(url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"HTTP {error.code} from {url}", status=error.code) from None
    except (OSError, ValueError) as error:
        raise NoAnswer(f"no answer from {url} ({getattr(error, 'reason', error)})") from None
    try:
        return json.loads(text)
    except ValueError:
        return text
