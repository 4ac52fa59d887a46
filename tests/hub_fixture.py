"""A server on loopback that speaks the protocol of the Hugging Face hub, for its own library to talk to.

It has repositories at commits and branches, git files and LFS files (which are redirected to another path, as to the hub's CDN),
ranges, and the failures of a hub: an unknown name or revision, a gated repository, a transfer cut short, bytes that are not the listed ones.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

LFS = (".safetensors", ".parquet", ".bin")
PATH = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/)?(?P<name>[^/]+/[^/]+)/(?P<verb>resolve|tree|revision)/(?P<rest>.+)"
)


@dataclass
class Repository:
    """One repository: its branches, and the files of each commit."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """What the server has, what it does wrong, and what it was asked for."""

    address: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS files by SHA-256
    cut: dict[str, int] = field(
        default_factory=dict
    )  # bytes after which a transfer breaks off, by the end of its path; once
    held: dict[str, int] = field(default_factory=dict)  # likewise, but the connection stays open and nothing comes
    swapped: dict[str, bytes] = field(
        default_factory=dict
    )  # served in place of the listed bytes, by the end of the path
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    reached: threading.Event = field(default_factory=threading.Event)  # a held transfer has sent its bytes

    def add(self, kind: str, name: str, files: dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Add a commit and return its name; a branch goes to it."""
        repository = self.repositories.setdefault((kind, name), Repository())
        text = "".join(f"{file}{hashlib.sha256(body).hexdigest()}" for file, body in sorted(files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[commit], repository.branches[branch], repository.gated = files, commit, gated
        self.blobs |= {hashlib.sha256(body).hexdigest(): body for file, body in files.items() if file.endswith(LFS)}
        return commit

    @property
    def elsewhere(self) -> str:
        """The same server under another host name: the library follows a redirect to another host only for the bytes."""
        return self.address.replace("127.0.0.1", "localhost")

    def fetched(self) -> list[str]:
        """Return the files whose bytes were asked for, LFS files by their digest."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/api/" not in path]


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/cdn/"):
            self._send_file(self.hub.blobs[path.removeprefix("/cdn/")], path)
            return
        found = PATH.fullmatch(path) or re.fullmatch(r"/api/(?P<kind>models/|datasets/)(?P<name>[^/]+/[^/]+)", path)
        assert found, path
        parts = {"verb": "revision", "rest": "main"} | found.groupdict()
        repository = self.hub.repositories.get((parts["kind"] or "models/", parts["name"]))
        if repository is None:
            self._send(401, error="RepoNotFound")
            return
        revision, _, file = (
            parts["rest"].replace("%2F", "/").partition("/") if parts["verb"] == "resolve" else (parts["rest"], "", "")
        )
        commit = repository.branches.get(revision.replace("%2F", "/"), revision)
        if commit not in repository.commits:
            self._send(404, error="RevisionNotFound")
        elif parts["verb"] == "revision":
            self._send_info(parts["name"], commit, repository)
        elif parts["verb"] == "tree":
            self._send(200, json.dumps([*list_tree(repository.commits[commit])]).encode())
        elif repository.gated and "Authorization" not in self.headers:
            self._send(401, error="GatedRepo")
        elif file not in repository.commits[commit]:
            self._send(404, error="EntryNotFound", headers={"X-Repo-Commit": commit})
        else:
            self._resolve(repository.commits[commit][file], file, commit)

    def _resolve(self, body: bytes, file: str, commit: str) -> None:
        if file.endswith(LFS):
            digest = hashlib.sha256(body).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body)), "X-Repo-Commit": commit}
            self._send(302, headers=linked | {"Location": f"{self.hub.elsewhere}/cdn/{digest}"})
        else:
            self._send_file(body, file, {"ETag": f'"{digest_blob(body)}"', "X-Repo-Commit": commit})

    def _send_info(self, name: str, commit: str, repository: Repository) -> None:
        files = repository.commits[commit]
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        info: dict[str, Any] = {
            "id": name,
            "sha": commit,
            "siblings": [{"rfilename": file} for file in files],
            "gated": repository.gated,
        }
        info["cardData"] = yaml.safe_load(card[1]) if card else None
        self._send(200, json.dumps(info).encode())

    def _send_file(self, body: bytes, path: str, headers: dict[str, str] | None = None) -> None:
        body = next((other for end, other in self.hub.swapped.items() if path.endswith(end)), body)
        start = int(found[1]) if (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        given = dict(headers or {}) | {"Accept-Ranges": "bytes"}
        if start:
            given["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        fault, limit = next(
            (
                (name, faults[end])
                for name, faults in (("cut", self.hub.cut), ("held", self.hub.held))
                for end in faults
                if path.endswith(end)
            ),
            ("", len(body)),
        )
        if self.command == "HEAD" or not fault:
            self._send(206 if start else 200, body[start:], headers=given)
            return
        faults = getattr(self.hub, fault)
        del faults[next(end for end in faults if path.endswith(end))]
        self._send(206 if start else 200, body[start:], headers=given, send=limit)
        self.wfile.flush()
        if fault == "held":
            self.hub.reached.set()
            self.connection.settimeout(60)
            with suppress(OSError):
                self.connection.recv(1)  # until the other side is gone
        self.close_connection = True

    def _send(
        self,
        status: int,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        error: str = "",
        send: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for header, value in ((headers or {}) | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def list_tree(files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a commit's tree."""
    for path, body in files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": digest_blob(body)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
        yield entry


def digest_blob(body: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Start an empty hub."""
    state = Hub()
    handler = type("HubHandler", (Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()
