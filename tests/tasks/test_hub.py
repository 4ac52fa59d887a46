"""`hub:` sources, fetched by huggingface_hub itself over HTTP from a server that speaks the hub's protocol on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_fixture import Hub

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


def resolve(reference: str, home: Path, endpoint: str) -> "subprocess.CompletedProcess[str]":
    """Resolve a source in a process of its own: the hub's library reads its address when it is imported."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, reference, str(home)],
        env=os.environ | hub, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip


def test_a_data_set_at_a_commit_is_fetched_once_and_known_by_its_content(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("datasets/", "acme/preferences", FILES)
    first = resolve(f"hub:datasets/acme/preferences@{commit}", tmp_path, hub.address)
    assert first.returncode == 0, first.stderr
    folder, digest = first.stdout.split()
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {name: body for name, body in FILES.items() if not name.endswith(".bin")}, "no pickle comes along"
    name = next(name for name in sorted(FILES) if not name.endswith(".bin"))
    part = resolve(f"hub:datasets/acme/preferences@{commit}/{name}", tmp_path, hub.address)
    path, own_digest = part.stdout.split()
    assert path == f"{folder}/{name}" and Path(path).read_bytes() == FILES[name] and own_digest != digest
    outside = resolve(f"hub:datasets/acme/preferences@{commit}/../{commit}", tmp_path, hub.address)
    assert "leads out of the repository" in outside.stderr.splitlines()[-1]
    again = resolve(f"hub:datasets/acme/preferences@{commit}", tmp_path, "http://127.0.0.1:9")
    assert again.stdout.split() == [folder, digest], "what was fetched needs no hub"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hub:datasets/acme/preferences@main", "expected a commit of 40 hex digits"),
        ("hub:datasets/acme/preferences", "expected a commit of 40 hex digits"),
        (f"hub:datasets/acme/nothing@{40 * '0'}", "did not give it (RepositoryNotFoundError); check name, commit"),
    ],
)
def test_what_the_hub_cannot_give_is_one_message(hub: Hub, tmp_path: Path, reference: str, message: str) -> None:
    hub.add("datasets/", "acme/preferences", FILES)
    refused = resolve(reference, tmp_path, hub.address)
    assert refused.returncode != 0
    assert message in refused.stderr.splitlines()[-1]


def test_a_hub_out_of_reach_is_one_message(tmp_path: Path) -> None:
    refused = resolve(f"hub:datasets/acme/preferences@{40 * '0'}", tmp_path, "http://127.0.0.1:9")
    assert refused.returncode != 0
    assert "check name, commit and network, or give a local folder" in refused.stderr.splitlines()[-1]


def test_a_gated_repository_says_what_a_person_has_to_do(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("datasets/", "acme/preferences", FILES, gated=True)
    refused = resolve(f"hub:datasets/acme/preferences@{commit}", tmp_path, hub.address)
    assert "it is gated: accept its terms" in refused.stderr.splitlines()[-1] and "HF_TOKEN" in refused.stderr
