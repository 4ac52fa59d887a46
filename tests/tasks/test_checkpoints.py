"""Checkpoints in a real S3: a training whose machine is gone ends on another one with the same bits."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.settings import Settings
from infra.store import Store, open_store
from tasks import checkpoints
from tasks.checkpoints import StoredCheckpoints, cut_metrics, discard_checkpoints, list_manifests, name_root, stage
from tasks.child import ChildJob, StepFailed, run_child
from tasks.step import Planned, Source
from tasks.train import train
from tests.faults.command import count_lines, wait_until
from tests.faults.held_store import HeldStore
from training.checkpoint import checksum
from training.config import Device, Runtime
from training.data.rows import RowsWriter
from training.data.schema import SCHEMA, digest_row
from training.objectives.sft import SftConfig

CONFIG = SftConfig(responses="all", batch_prompts=4, epochs=16, max_tokens=96, learning_rate=3e-4)
NUM_STEPS = 48


@pytest.fixture
def store(s3: Settings) -> Store:
    return open_store(s3)


@pytest.fixture
def plan(tiny_policy: Path, tmp_path: Path) -> Planned:
    """A training of 48 steps on twelve rows, with a checkpoint every fourth, of which two are kept in the store."""
    rows = []
    for i in range(12):
        turns, responses = [{"role": "user", "content": f"Question {i}?"}], [f"Answer {i}", "No"]
        rows.append(
            {"row_id": digest_row(turns, responses), "split": "train", "prompt": turns, "responses": responses,
             "preferred": 0, "truncated": None, "logq": None, "source": "test", "line": i}
        )  # fmt: skip
    (tmp_path / "rows").mkdir()
    with RowsWriter(tmp_path / "rows" / "rows.parquet", SCHEMA) as out:
        out.write(rows)
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps({"regime": "support"}))
    inputs = {"rows": Source("rows", tmp_path / "rows", os.urandom(32).hex()), "base": Source("base", tiny_policy, "b")}
    runtime = Runtime(device=Device.cpu, threads=1, checkpoint_every_steps=4, stored_checkpoints=2)
    return train(CONFIG, inputs, runtime=runtime)


def run(planned: Planned, folder: Path, *hear: Callable[[], None]) -> None:
    """Run the step's child in a folder, as the parent does."""
    job = ChildJob(
        package="training",
        name="train",
        config=planned.config.model_dump(mode="json"),
        runtime=planned.runtime.model_dump(mode="json"),
        inputs={name: source.path for name, source in planned.inputs.items() if isinstance(source, Source)},
        folder=folder,
        environment={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )
    job.output.mkdir(parents=True, exist_ok=True)
    run_child(job, on_metrics=lambda _: [call() for call in hear] and None)


def find_children(package: str) -> list[psutil.Process]:
    """Return this process's living children that run a package."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # ended a moment ago
            if package in child.cmdline():
                found.append(child)
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]


def test_a_machine_that_is_gone_costs_the_steps_after_the_last_upload(
    plan: Planned, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the child once two checkpoints are up, then its folder is deleted; another folder ends with the same bits."""
    run(plan, tmp_path / "whole")
    root, gone = name_root(plan), tmp_path / "gone"
    monkeypatch.setattr("tasks.child.LISTEN_SECONDS", 0.01)  # all the steps take about a second

    def upload_then_kill() -> None:
        """Hold the child, which makes a step faster than an upload, until its newest checkpoint is up."""
        newest, _ = checkpoints.find_newest(gone)
        for child in find_children("training") if newest > 0 else []:
            child.suspend()
            stored()
            wait_until(
                "the newest to be up",
                lambda: any(checkpoints.step_of(name) >= newest for name in list_manifests(store, root)),
            )
            if len(list_manifests(store, root)) >= 2:
                child.kill()
            child.resume()

    with pytest.raises(StepFailed, match="SIGKILL"), StoredCheckpoints(store, plan, gone) as stored:
        run(plan, gone, upload_then_kill)
    shutil.rmtree(gone)
    left = list_manifests(store, root)
    assert 2 <= len(left) <= 3

    other, started = tmp_path / "other", time.time()
    with StoredCheckpoints(store, plan, other) as stored:
        ((step, _),) = [checkpoints.find_newest(other)]
        assert step == checkpoints.step_of(left[0]) >= 8
        run(plan, other, stored)
    weights = [(tmp_path / name / "output" / "model.safetensors").read_bytes() for name in ("whole", "other")]
    assert weights[0] == weights[1]
    lines = read_metrics(other)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["time"] > started for line in lines] == [line["step"] > step for line in lines]
    expected = read_metrics(tmp_path / "whole")
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in expected]
    assert len(list_manifests(store, root)) == 2
    names = {item.name.split("/")[3].removesuffix(".json")[:13] for item in store.scan(root)}
    assert len(names) == 2, "files of the older ones are gone too"
    discard_checkpoints(store, plan)
    assert not list(store.scan(root))


def test_training_goes_on_while_a_checkpoint_is_on_its_way(
    plan: Planned, store: Store, s3: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes no byte until the child has made twenty more steps, and deleted the checkpoint for newer ones; then all of it."""
    plan = train(CONFIG.model_copy(update={"epochs": 64}), plan.inputs, runtime=plan.runtime)
    root, folder, landed = name_root(plan), tmp_path / "here", tmp_path / "landed"
    monkeypatch.setattr("tasks.child.LISTEN_SECONDS", 0.01)
    told: list[int] = []  # steps of the metrics, each time that the parent looks while the upload is held

    with HeldStore(s3.s3_endpoint, held=f"PUT /{s3.s3_bucket}/checkpoints".encode(), pass_request=False) as held:

        def listen() -> None:
            if held.release.is_set():
                return
            stored()
            if held.reached.is_set():
                told.append(count_lines(folder / "output" / "metrics.jsonl"))
                if told[-1] < told[0] + 20:
                    return
                assert checkpoints.find_newest(folder)[0] > stored._uploaded and not list_manifests(store, root)
                assert stored._upload is not None and stored._upload.is_alive()
                held.release.set()
                (manifest,) = wait_until("the checkpoint to be up", lambda: list_manifests(store, root))
                assert checkpoints.step_of(manifest) == stored._uploaded <= told[0]
                landed.mkdir()
                checkpoints.fetch(store, root, manifest, landed)

        slow = open_store(s3.model_copy(update={"s3_endpoint": held.endpoint}))
        with StoredCheckpoints(slow, plan, folder) as stored:
            run(plan, folder, listen)
    assert held.release.is_set() and len(set(told)) > 2, "heard of step after step"
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 4 * NUM_STEPS + 1))
    step, whole = checkpoints.find_newest(landed)
    assert step == stored._uploaded and whole is not None
    expected = json.loads((whole / "state.json").read_text())["crc32"]
    assert {path.name: checksum(path) for path in (whole / "tensors").iterdir()} == expected
    assert [line["step"] for line in read_metrics(landed)][:step] == list(range(1, step + 1))
    discard_checkpoints(store, plan)


def leave_checkpoint(folder: Path, step: int) -> Path:
    """Write what looks like a checkpoint from outside."""
    checkpoint = folder / "work" / "checkpoints" / f"step-{step:08d}"
    (checkpoint / "tensors").mkdir(parents=True)
    (checkpoint / "tensors" / "a").write_bytes(b"weights")
    (checkpoint / "rng.safetensors").write_bytes(b"rng")
    (checkpoint / "state.json").write_text(json.dumps({"shards": {"a": 7}}))
    return checkpoint


def upload(store: Store, plan: Planned, folder: Path) -> None:
    with StoredCheckpoints(store, plan, folder) as stored:
        stored()
        if stored._upload is not None:
            stored._upload.join()


def test_what_this_machine_has_is_not_fetched_and_what_it_lacks_is(plan: Planned, store: Store, tmp_path: Path) -> None:
    leave_checkpoint(tmp_path / "a", 8)
    upload(store, plan, tmp_path / "a")
    leave_checkpoint(tmp_path / "newer", 12)
    with StoredCheckpoints(store, plan, tmp_path / "newer"):
        assert [path.name for path in (tmp_path / "newer" / "work" / "checkpoints").iterdir()] == ["step-00000012"]
    leave_checkpoint(tmp_path / "older", 4)
    with StoredCheckpoints(store, plan, tmp_path / "older"):
        step, newest = checkpoints.find_newest(tmp_path / "older")
        assert step == 8 and newest is not None and (newest / "tensors" / "a").read_bytes() == b"weights"
    discard_checkpoints(store, plan)


def test_a_checkpoint_whose_file_was_changed_is_passed_over(
    plan: Planned, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 8):
        leave_checkpoint(tmp_path / str(step), step)
        upload(store, plan, tmp_path / str(step))
    newest, _ = list_manifests(store, name_root(plan))
    (name,) = [
        item.name for item in store.scan(name_root(plan)) if "00000008-" in item.name and item.name.endswith("/a")
    ]
    store.put(name, b"WEIGHTS")
    with StoredCheckpoints(store, plan, tmp_path / "b"):
        assert checkpoints.find_newest(tmp_path / "b")[0] == 4
    assert f"{newest} cannot be fetched" in caplog.text
    assert newest not in list_manifests(store, name_root(plan)), (
        "what never can be fetched is not kept instead of others"
    )
    discard_checkpoints(store, plan)


def test_the_last_upload_stays_where_a_newer_one_could_not_be_fetched_for_a_while(
    plan: Planned, store: Store, tmp_path: Path
) -> None:
    """With room for one: the newer is good and stays, and what this run has made since is not given up for it."""
    plan = train(CONFIG, plan.inputs, runtime=plan.runtime.model_copy(update={"stored_checkpoints": 1}))
    for step in (40, 4, 8):
        leave_checkpoint(tmp_path / str(step), step)
        stored = StoredCheckpoints(store, plan, tmp_path / str(step))  # nothing fetched
        stored()
        wait_until("the upload to be done", lambda stored=stored: not stored._upload.is_alive())
    assert [checkpoints.step_of(name) for name in list_manifests(store, name_root(plan))] == [40, 8]
    discard_checkpoints(store, plan)


def test_a_damaged_checkpoint_here_gives_way_to_a_whole_one_of_the_store(
    plan: Planned, store: Store, tmp_path: Path
) -> None:
    leave_checkpoint(tmp_path / "a", 8)
    upload(store, plan, tmp_path / "a")
    for case, (step, name) in enumerate(
        [(8, "tensors/a"), (12, "tensors/a"), (12, "state.json"), (12, "rng.safetensors")]
    ):
        folder = tmp_path / f"case{case}"
        damaged = leave_checkpoint(folder, step)
        os.truncate(damaged / name, 3) if name != "rng.safetensors" else (damaged / name).unlink()
        with StoredCheckpoints(store, plan, folder):
            found = list((folder / "work" / "checkpoints").iterdir())
            assert [path.name for path in found] == ["step-00000008"], name
            assert (found[0] / "tensors" / "a").read_bytes() == b"weights"
    discard_checkpoints(store, plan)


def test_success_does_not_wait_for_an_upload_that_would_be_deleted(
    plan: Planned, store: Store, s3: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store takes the request and is silent; what else goes there afterwards is not stopped."""
    leave_checkpoint(tmp_path / "a", 8)
    with HeldStore(s3.s3_endpoint, held=f"PUT /{s3.s3_bucket}/checkpoints".encode(), pass_request=False) as held:
        slow = open_store(s3.model_copy(update={"s3_endpoint": held.endpoint}))
        with StoredCheckpoints(slow, plan, tmp_path / "a") as stored:
            stored()
            assert held.reached.wait(20)
            started = time.monotonic()
        assert time.monotonic() - started < 2 * checkpoints.LAST_SECONDS
        leave_checkpoint(tmp_path / "artifact", 8)
        assert slow.upload_folder(tmp_path / "artifact", "elsewhere")
        held.release.set()
        assert stored._upload is not None
        stored._upload.join(20)
    assert not stored._upload.is_alive() and not list_manifests(store, name_root(plan))
    assert "was not stored" not in caplog.text
    discard_checkpoints(store, plan)


def test_a_checkpoint_without_its_manifest_is_not_seen(plan: Planned, store: Store, tmp_path: Path) -> None:
    store.put(f"{name_root(plan)}/step-00000020-0000abcd/checkpoint/state.json", b"{}")
    with StoredCheckpoints(store, plan, tmp_path):
        assert checkpoints.find_newest(tmp_path) == (-1, None)
    discard_checkpoints(store, plan)
    assert not list(store.scan(name_root(plan)))


def test_what_another_machine_stored_is_deleted_by_an_attempt_that_stores_nothing(
    plan: Planned, store: Store, tmp_path: Path
) -> None:
    leave_checkpoint(tmp_path, 8)
    upload(store, plan, tmp_path)
    assert list(store.scan(name_root(plan)))
    silent = train(CONFIG, plan.inputs, runtime=plan.runtime.model_copy(update={"stored_checkpoints": 0}))
    discard_checkpoints(store, silent)
    assert not list(store.scan(name_root(plan)))


def test_nothing_goes_up_where_nobody_asked(plan: Planned, store: Store, tmp_path: Path) -> None:
    runtime = plan.runtime.model_copy(update={"stored_checkpoints": 0})
    silent = train(CONFIG, plan.inputs, runtime=runtime)
    assert silent.fingerprint == plan.fingerprint, "where checkpoints lie is no identity"
    leave_checkpoint(tmp_path, 8)
    upload(store, silent, tmp_path)
    assert not list(store.scan(name_root(silent)))


def test_a_store_that_is_away_costs_checkpoints_and_nothing_else(
    plan: Planned, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = Store(bucket="none", endpoint="http://127.0.0.1:9", access_key="a", secret_key="b")
    leave_checkpoint(tmp_path / "a", 8)
    with StoredCheckpoints(away, plan, tmp_path / "a") as stored:
        stored()
        assert stored._upload is not None
        stored._upload.join()
    discard_checkpoints(away, plan)
    assert (
        "checkpoints/train" in caplog.text
        and "are not looked for" in caplog.text
        and "step-00000008 was not stored" in caplog.text
        and "checkpoints stay at s3://none/checkpoints/train" in caplog.text
    )


def test_a_disk_that_takes_no_second_names_costs_checkpoints_and_nothing_else(
    plan: Planned, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave_checkpoint(tmp_path, 4)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with StoredCheckpoints(store, plan, tmp_path) as stored:
        stored()
        stored()
    assert [record.getMessage() for record in caplog.records] == [
        "step-00000004 was not stored: [Errno 1] Operation not permitted"
    ]
    assert list_manifests(store, name_root(plan)) == []


def test_metrics_are_cut_to_what_the_newest_checkpoint_knows_of(tmp_path: Path) -> None:
    """As training does when it goes on: whoever follows the file would tell the steps behind it twice."""
    metrics = tmp_path / "output" / "metrics.jsonl"
    metrics.parent.mkdir()
    for told, expected in ((10, "0123456789"), (30, "0123456789abcdef"), (None, "")):
        metrics.write_text("0123456789abcdef")
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        if told is not None:
            state = {"shards": {"a": 7}, "progress": {"metrics_bytes": told}}
            (leave_checkpoint(tmp_path, 4) / "state.json").write_text(json.dumps(state))
        cut_metrics(tmp_path)
        assert metrics.read_text() == expected


def test_what_training_deletes_meanwhile_is_left_alone_or_whole(tmp_path: Path) -> None:
    """The second name of a file outlives the first; a checkpoint that is half gone is not taken."""
    checkpoint = leave_checkpoint(tmp_path, 4)
    staged = stage(checkpoint, tmp_path)
    shutil.rmtree(checkpoint)
    assert staged is not None and (staged / "checkpoint" / "tensors" / "a").read_bytes() == b"weights"
    half = leave_checkpoint(tmp_path, 8)
    (half / "tensors" / "a").unlink()
    assert stage(half, tmp_path) is None
    (half / "state.json").unlink()
    assert stage(half, tmp_path) is None
