"""`varflow mirror`: pinned, checked, resumable, into a folder and into the store; and what of it is refused when it is read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.settings import Settings
from infra.store import Store, open_store
from tasks.sources import resolve_source
from tests.faults.command import CALL
from tests.hub_fixture import Hub
from training.model import check_model_folder

LARGE = 24 << 20  # the library writes 10 MiB at a time
CARD = b"---\nlicense: apache-2.0\n---\n# A model\n"
NOWHERE = Store(bucket="x", endpoint="http://127.0.0.1:9", access_key="x", secret_key="x")


@pytest.fixture
def model(hub: Hub, tiny_policy: Path) -> str:
    """Put a small model with all that a hub repository may have beside it on the hub; return its commit."""
    files = {path.name: path.read_bytes() for path in tiny_policy.iterdir()}
    extra = {
        "README.md": CARD,
        "pytorch_model.bin": b"\x80\x04pickle",
        "modeling_tiny.py": b"raise SystemExit",
        ".gitattributes": b"",
    }
    return hub.add("models/", "acme/tiny", files | extra)


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Any:
    """Give a function that starts `varflow mirror` against the hub, with a home and a cache of its own."""
    variables = {
        "VARFLOW_HUB_ENDPOINT": hub.address, "VARFLOW_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return partial(
        subprocess.Popen,
        env=os.environ | variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(command: Any, *words: str, **options: Any) -> tuple[int, str, str]:
    """Return (exit status, stdout, stderr) of a `varflow mirror`."""
    process = command([sys.executable, "-c", CALL, "mirror", *words], **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def ask(command: Any, *words: str, **options: Any) -> dict[str, Any]:
    status, out, err = run(command, *words, "--json", **options)
    assert status == 0, err
    return dict(json.loads(out))


def resolve(reference: str, home: Path, store: Store = NOWHERE) -> Any:
    return resolve_source(reference, store=store, settings=Settings(home=home))


def test_a_model_is_pinned_by_commit_with_digests_and_licence(
    hub: Hub, model: str, command: Any, tmp_path: Path, tiny_policy: Path
) -> None:
    (one,) = ask(command, "models", "acme/tiny", "--to", "mirror")["repositories"]
    folder = tmp_path / "mirror" / "models" / "acme" / "tiny" / model
    assert (one["commit"], one["revision"], one["licence"], one["new"]) == (model, "main", "apache-2.0", True)
    assert one["where"] == str(folder) and sorted(one["left_out"]) == ["modeling_tiny.py", "pytorch_model.bin"]
    names = {file["name"] for file in one["files"]}
    assert names == {path.name for path in tiny_policy.iterdir()} | {"README.md"}
    assert {path.name for path in folder.iterdir()} == names | {".mirror.json"}, "neither pickles, code nor a cache"
    assert resolve(str(folder), tmp_path).digest
    check_model_folder(folder)
    hub.asked.clear()
    status, out, _ = run(command, "models", "acme/tiny", "--to", "mirror")
    assert status == 0 and "was there already" in out and "left out" in out and hub.fetched() == []


def test_a_branch_that_moves_on_is_another_commit_and_the_old_one_stays(
    hub: Hub, model: str, command: Any, tmp_path: Path, tiny_policy: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_policy.iterdir()} | {"README.md": CARD + b"more\n"}
    ask(command, "models", "acme/tiny", "--to", "m")
    moved = hub.add("models/", "acme/tiny", files)
    (one,) = ask(command, "models", "acme/tiny", "--to", "m")["repositories"]
    (old,) = ask(command, "models", "acme/tiny", "--to", "m", "--revision", model)["repositories"]
    assert (one["commit"], old["commit"], old["new"]) == (moved, model, False) and moved != model


def test_killed_midway_the_next_one_finishes_and_fetches_nothing_twice(hub: Hub, command: Any, tmp_path: Path) -> None:
    big = {f"part-{i}.parquet": bytes([i]) * 30_000 for i in range(4)}
    commit = hub.add("datasets/", "acme/rows", {"README.md": b"---\nlicense: mit\n---\n"} | big)
    digest = next(name for name, body in hub.blobs.items() if body == big["part-3.parquet"])
    hub.held[digest] = 20_000
    process = command([sys.executable, "-c", CALL, "mirror", "datasets", "acme/rows", "--to", "m"])
    assert hub.reached.wait(120)
    partial_folder = tmp_path / "m" / "datasets" / "acme" / "rows" / f".{commit}.partial"
    while (
        len(list(partial_folder.rglob("*.metadata"))) < 4
    ):  # of all but the one that is held, each written behind its file
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (partial_folder.parent / commit).exists()
    hub.asked.clear()
    (one,) = ask(command, "datasets", "acme/rows", "--to", "m")["repositories"]
    assert one["new"] and hub.fetched() == [digest], "the file under way alone"
    assert not partial_folder.exists()
    assert (partial_folder.parent / commit / "part-3.parquet").read_bytes() == big["part-3.parquet"]


def test_a_transfer_that_breaks_off_is_taken_up_where_it_ended(hub: Hub, command: Any, tmp_path: Path) -> None:
    body = bytes(range(256)) * (LARGE // 256)
    commit = hub.add("datasets/", "acme/rows", {"rows.parquet": body})
    (digest,) = hub.blobs
    hub.cut[digest] = LARGE * 2 // 3
    ask(command, "datasets", "acme/rows", "--to", "m")
    assert [span for _, path, span in hub.asked if path == f"/cdn/{digest}" and span], "asked for the rest alone"
    assert (tmp_path / "m" / "datasets" / "acme" / "rows" / commit / "rows.parquet").read_bytes() == body


def test_bytes_other_than_the_listed_ones_are_refused_and_fetched_anew(hub: Hub, command: Any) -> None:
    hub.add("datasets/", "acme/rows", {"rows.parquet": b"a" * 1000, "a.json": b"{}"})
    (digest,) = hub.blobs
    hub.swapped[digest] = b"b" * 1000
    status, _, err = run(command, "datasets", "acme/rows", "--to", "m")
    assert status == 1 and "rows.parquet has the digest" in err and f"the hub lists {digest}; it was removed" in err
    hub.swapped.clear()
    hub.asked.clear()
    assert ask(command, "datasets", "acme/rows", "--to", "m")["repositories"][0]["new"]
    assert "a.json" not in hub.fetched()


def test_all_that_cannot_be_pinned_is_told_at_once_and_nothing_is_fetched(
    hub: Hub, model: str, command: Any, tmp_path: Path
) -> None:
    hub.add("models/", "acme/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    status, _, err = run(command, "models", "acme/tiny", "acme/nothing", "acme/pickled", "--to", "m")
    assert status == 1 and hub.fetched() == [] and not (tmp_path / "m").exists()
    assert "model acme/nothing at main" in err and "RepositoryNotFoundError" in err
    assert "got no safetensors (pytorch_model.bin)" in err and err.rstrip().endswith("nothing was fetched")
    status, _, err = run(command, "models", "acme/tiny", "--to", "m", "--revision", "v9")
    assert status == 1 and "acme/tiny at v9" in err and "RevisionNotFoundError" in err
    hub.add("datasets/", "acme/scripted", {"scripted.py": b"", "README.md": b""})
    status, _, err = run(command, "datasets", "acme/scripted", "--to", "m")
    assert status == 1 and "no data files" in err and "--revision refs/convert/parquet" in err


def test_a_gated_repository_and_a_hub_out_of_reach_are_one_message(hub: Hub, command: Any) -> None:
    hub.add("datasets/", "acme/secret", {"rows.json": b"{}"}, gated=True)
    status, _, err = run(command, "datasets", "acme/secret", "--to", "m")
    assert status == 1 and "it is gated: accept its terms" in err
    away = {**os.environ, "VARFLOW_HUB_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    status, _, err = run(command, "datasets", "acme/secret", "--to", "m", env=away)
    assert status == 1 and "the hub http://127.0.0.1:9 did not give it" in err


def test_a_copy_that_was_changed_is_refused_with_all_that_is_wrong(hub: Hub, command: Any, tmp_path: Path) -> None:
    commit = hub.add("datasets/", "acme/rows", {"a.json": b"{}", "b.json": b"[]", "c.json": b"1"})
    ask(command, "datasets", "acme/rows", "--to", "m")
    folder = tmp_path / "m" / "datasets" / "acme" / "rows" / commit
    (folder / "a.json").write_bytes(b"{ }")
    (folder / "b.json").unlink()
    (folder / "d.json").write_bytes(b"{}")
    for reference in (folder, tmp_path / "m"):
        with pytest.raises(ValueError, match="3 files are not those that were mirrored of acme/rows@") as refused:
            resolve(str(reference), tmp_path)
        lines = str(refused.value).splitlines()
        assert lines[1:3] == ["  b.json: not there", "  d.json: not in the manifest"]
        assert lines[3].startswith("  a.json: got SHA-256") and "remove the folder and mirror" in lines[-1]


def test_the_store_serves_another_machine_and_names_what_it_lacks(
    hub: Hub, model: str, command: Any, s3: Settings, tmp_path: Path
) -> None:
    settings = s3.model_copy(
        update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}", "home": tmp_path / "home", "hub_endpoint": hub.address}
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | settings.own_environment()
    (one,) = ask(command, "models", "acme/tiny", env=env)["repositories"]
    store = open_store(settings)
    assert one["reference"] == f"mirror:acme/tiny@{model}" and one["where"] == store.url(
        f"mirror/models/acme/tiny/{model}"
    )
    here, there = (
        resolve(one["reference"], tmp_path / "home", store),
        resolve(one["reference"], tmp_path / "other", store),
    )
    assert here.digest == there.digest and here.path != there.path
    check_model_folder(there.path)
    assert ask(command, "models", "acme/tiny", env=env)["repositories"][0]["new"] is False
    store.delete(f"mirror/models/acme/tiny/{model}/config.json")
    store.put(f"mirror/models/acme/tiny/{model}/tokenizer.json", b"{}")
    with pytest.raises(
        ValueError, match=r"2 files are not in .*:\n  config\.json\n  tokenizer\.json\nrun `varflow mirror models"
    ):
        resolve(one["reference"], tmp_path / "third", store)
    with pytest.raises(
        ValueError, match=rf"expected one of mirror:acme/tiny@{model}; `varflow mirror models acme/other"
    ):
        resolve(f"mirror:acme/other@{model}", tmp_path / "third", store)
    assert ask(command, "models", "acme/tiny", env=env)["repositories"][0]["new"] is True
    assert resolve(one["reference"], tmp_path / "third", store).digest == here.digest


def test_mirrored_data_sets_are_a_folder_of_benchmark_files(
    hub: Hub, command: Any, s3: Settings, tmp_path: Path
) -> None:
    from evaluation.harness.mirror import build_mirror

    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["q"], "answer": ["#### 1"]}), rows)
    header = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n---\n"
    commits = [
        hub.add("datasets/", name, {"README.md": header, "main/test-00000-of-00001.parquet": rows.read_bytes()})
        for name in ("openai/gsm8k", "a/b")
    ]
    settings = s3.model_copy(
        update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}", "home": tmp_path / "home", "hub_endpoint": hub.address}
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | settings.own_environment()
    files = ask(command, "datasets", "openai/gsm8k", "a/b", env=env)["files"]
    assert files == f"benchmarks:openai/gsm8k@{commits[0]},a/b@{commits[1]}"
    stored = resolve(files, tmp_path / "other", open_store(settings))
    ask(command, "datasets", "openai/gsm8k", "a/b", "--to", "m", env=env)
    assert resolve(str(tmp_path / "m"), tmp_path).digest == stored.digest, "the same data wherever they lie"
    counted = build_mirror(stored.path, tmp_path / "built")
    assert (
        counted["openai/gsm8k/main/test-00000-of-00001.parquet"] == 1
        and (tmp_path / "built" / "a" / "b" / "README.md").is_file()
    )
    shutil.copytree(
        tmp_path / "m" / "datasets" / "a" / "b" / commits[1], tmp_path / "m" / "datasets" / "a" / "b" / (40 * "0")
    )
    with pytest.raises(ValueError, match="a/b is there at the commits 000"):
        build_mirror(tmp_path / "m", tmp_path / "built")


def test_the_data_sets_of_a_task_are_found_by_its_name(hub: Hub, command: Any, tmp_path: Path) -> None:
    commit = hub.add("datasets/", "allenai/ai2_arc", {"ARC-Easy/test-00000-of-00001.parquet": b"rows"})
    answer = ask(command, "datasets", "--for-task", "arc_easy", "--for-task", "arc_challenge", "--to", "m")
    assert [(one["repository"], one["commit"]) for one in answer["repositories"]] == [("allenai/ai2_arc", commit)]
    assert answer["files"] == str(tmp_path / "m")
    for words, reason in (
        (("--for-task", "arc_esy"), "has no task or group of this name (nearest: arc_easy"),
        (("--for-task", "mbpp"), "task 'mbpp' cannot be run here: it runs code outside of our sandbox"),
        ((), "got neither a name nor --for-task"),
    ):
        status, _, err = run(command, "datasets", *words, "--to", "m")
        assert status == 1 and reason in err and err.count("\n") == 1
