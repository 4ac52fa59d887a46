"""What both kinds of endpoints share: how long a server is asked again, and that it is asked itself."""

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from evaluation.harness.endpoint import ATTEMPTS, gives_up
from evaluation.served import Server, Unanswered, read_wait
from tests.evaluation.certificates import write_certificate
from tests.evaluation.chat_server import ChatServer, Refuse, prefer_first
from training.job import Interrupted

BODY = {"messages": []}


def open_server(url: str, *, halted: threading.Event | None = None) -> Server:
    return Server(url, key="", connections=1, stop=gives_up, halted=halted or threading.Event())


def test_a_benchmark_does_not_wait_as_long_as_a_server_likes() -> None:
    with ChatServer(lambda _: Refuse(429, "quota", {"Retry-After": "3600"})) as served:
        with pytest.raises(Unanswered, match=r"^status 429, which asks to wait 3600 s: quota$") as told:
            open_server(served.url).ask("POST", "/chat/completions", json=BODY)
        assert (told.value.attempts, len(served.asked)) == (1, 1)


def test_tries_are_counted() -> None:
    with ChatServer(lambda _: Refuse(503, headers={"Retry-After": "0"})) as served:
        with pytest.raises(Unanswered) as told:
            open_server(served.url).ask("POST", "/chat/completions", json=BODY)
        assert told.value.attempts == len(served.asked) == ATTEMPTS


def test_a_pause_ends_when_it_is_halted() -> None:
    halted = threading.Event()

    def busy(_: object) -> Refuse:
        halted.set()
        return Refuse(503, headers={"Retry-After": "100"})

    with ChatServer(busy) as served:
        with pytest.raises(Interrupted):
            open_server(served.url, halted=halted).ask("POST", "/chat/completions", json=BODY)
        assert len(served.asked) == 1


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with ChatServer(prefer_first) as served:
        assert open_server(served.url).ask("POST", "/chat/completions", json=BODY)["model"] == "judge-2026"


def test_a_private_authority_is_trusted_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = write_certificate(tmp_path)
    with ChatServer(prefer_first, certificate=certificate) as served:
        with pytest.raises(ValueError, match=r"^127\.0\.0\.1: .*self-signed certificate.*; set SSL_CERT_FILE to the"):
            open_server(served.url).ask("POST", "/chat/completions", json=BODY)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert open_server(served.url).ask("POST", "/chat/completions", json=BODY)["model"] == "judge-2026"
        assert len(served.asked) == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match=r"^SSL_CERT_FILE or SSL_CERT_DIR: .*No such file.*; correct it, or unset it"):
        open_server(served.url)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("2.5", 2.5, 2.5),
        ("-1", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        (format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 3000, 3600),
    ],
)
def test_both_forms_of_retry_after(header: str, least: float, most: float) -> None:
    waited = read_wait(header)
    assert waited is not None and least <= waited <= most


@pytest.mark.parametrize("header", [None, "soon", "Wed, 21 Oct 2015 07:28:00"])
def test_a_retry_after_that_says_nothing_is_none(header: str | None) -> None:
    assert read_wait(header) is None
