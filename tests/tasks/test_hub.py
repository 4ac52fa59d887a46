"""`hub:` sources, fetched by huggingface_hub itself over HTTP from a server that speaks the hub's protocol on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# preferences\n",
    "helpful/test.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "old/weights.bin": b"\x80\x04pickle",
}
RESOLVE = (
    "import sys; from pathlib import Path; from infra.settings import read_settings; from infra.store import Store; "
    "from tasks.sources import resolve_source; nowhere = Store(bucket='x', endpoint='http://127.0.0.1:9', access_key='x', secret_key='x'); "
    "source = resolve_source(sys.argv[1], store=nowhere, settings=read_settings(home=Path(sys.argv[2]))); "
    "print(source.path); print(source.digest)"
)


class Hub(BaseHTTPRequestHandler):
    """One data set at one commit."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in {f"/api/datasets/acme/preferences{end}" for end in ("", f"/revision/{COMMIT}")}:
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "acme/preferences", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(200, body, with_body=with_body)
            return
        if path == f"/api/datasets/acme/preferences/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode(), with_body=with_body)
            return
        name = path.removeprefix(f"/datasets/acme/preferences/resolve/{COMMIT}/")
        if name in FILES:
            self._send(200, FILES[name], with_body=with_body, etag=hashlib.sha1(FILES[name]).hexdigest())
        else:
            self._send(404, b"", with_body=with_body, error="RepoNotFound")

    def _send(self, status: int, body: bytes, *, with_body: bool, etag: str = "", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        for header, value in (("ETag", f'"{etag}"' if etag else ""), ("X-Error-Code", error)):
            if value:
                self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Yield the address of a hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def resolve(reference: str, home: Path, endpoint: str) -> "subprocess.CompletedProcess[str]":
    """Resolve a source in a process of its own: the hub's library reads its address when it is imported."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, reference, str(home)],
        env=os.environ | hub, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip


def test_a_data_set_at_a_commit_is_fetched_once_and_known_by_its_content(hub: str, tmp_path: Path) -> None:
    first = resolve(f"hub:datasets/acme/preferences@{COMMIT}", tmp_path, hub)
    assert first.returncode == 0, first.stderr
    folder, digest = first.stdout.split()
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {name: body for name, body in FILES.items() if not name.endswith(".bin")}, "no pickle comes along"
    again = resolve(f"hub:datasets/acme/preferences@{COMMIT}", tmp_path, "http://127.0.0.1:9")
    assert again.stdout.split() == [folder, digest], "what was fetched needs no hub"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hub:datasets/acme/preferences@main", "expected a commit of 40 hex digits"),
        ("hub:datasets/acme/preferences", "expected a commit of 40 hex digits"),
        (f"hub:datasets/acme/nothing@{COMMIT}", "the hub did not give it (RepositoryNotFoundError)"),
    ],
)
def test_what_the_hub_cannot_give_is_one_message(hub: str, tmp_path: Path, reference: str, message: str) -> None:
    refused = resolve(reference, tmp_path, hub)
    assert refused.returncode != 0
    assert message in refused.stderr.splitlines()[-1]


def test_a_hub_out_of_reach_is_one_message(tmp_path: Path) -> None:
    refused = resolve(f"hub:datasets/acme/preferences@{COMMIT}", tmp_path, "http://127.0.0.1:9")
    assert refused.returncode != 0
    assert "check name, commit and network, or give a local folder" in refused.stderr.splitlines()[-1]
