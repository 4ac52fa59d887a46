"""JSON over HTTP to the servers of the stack: enough to ask after their health before any library of theirs is loaded."""

import json
import urllib.error
import urllib.request
from typing import Any

ANSWER_SECONDS = 5.0

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows no loopback of ours


class NoAnswer(Exception):  # noqa: N818 - a state, told as the reason
    """The server did not answer, or answered with an error: `status` is the HTTP status, None without one."""

    def __init__(self, reason: str, *, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET a URL, or POST a JSON body to it, and return the decoded answer (the text where it is not JSON)."""
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
