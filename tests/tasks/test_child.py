"""Supervision with real processes: nothing is left behind, whatever ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tasks import child as supervision
from tasks.child import ChildJob, StepFailed, UserError, follow, run_child

PACKAGE = """
    import subprocess, sys, time
    from training.job import main

    def steps(job):
        from training.metrics import MetricsWriter
        with MetricsWriter(job.output / "metrics.jsonl", total=3) as metrics:
            for step in (1, 2, 3):
                metrics.write(step, {"train/loss": 1.0 / step})
        job.write_summary({"steps": 3})

    def refuse(job):
        raise ValueError("row 7: got nothing, expected text; fix the row")

    def stubborn(job):
        (job.work / "grandchild").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        while True:
            time.sleep(0.1)

    def polite(job):
        (job.work / "started").touch()
        while not job.stop.wait(0.05):
            pass
        (job.work / "saved").touch()
        job.check_stop()

    def overflow(job):
        with open("/dev/full", "w") as disk:
            disk.write("a checkpoint")

    def vanish(job):
        print("last words", flush=True)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

    def bereft(job):
        from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
        from training.launch import raise_failure
        failure = ProcessFailure(local_rank=1, pid=1, exitcode=-9, error_file="")
        raise_failure(job, {1: failure}, ranks=2)

    if __name__ == "__main__":
        table = {"steps": steps, "refuse": refuse, "stubborn": stubborn, "polite": polite, "vanish": vanish, "overflow": overflow, "bereft": bereft}
        sys.exit(main(table, sys.argv[1:]))
"""


@pytest.fixture
def make_job(tmp_path: Path):
    """Return a maker of jobs of a package written for these tests."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "trial.py").write_text(textwrap.dedent(PACKAGE))

    def make(name: str) -> ChildJob:
        folder = tmp_path / "attempt"
        folder.mkdir(exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "package"), "PYTHONSAFEPATH": "1"}
        return ChildJob("trial", name, {}, {}, {}, folder, environment)

    return make


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_every_metric_line_arrives_once_and_the_summary_is_there(make_job) -> None:
    heard: list[dict[str, float]] = []
    job = make_job("steps")
    run_child(job, on_metrics=heard.extend)
    assert [(line["step"], line["total"], line["train/loss"]) for line in heard] == [
        (1, 3, 1.0),
        (2, 3, 0.5),
        (3, 3, 1 / 3),
    ]
    assert (job.output / "summary.json").exists()


def test_the_users_mistake_comes_back_in_the_childs_words(make_job) -> None:
    with pytest.raises(UserError, match="refuse: row 7: got nothing, expected text; fix the row"):
        run_child(make_job("refuse"), on_metrics=lambda _: None)


def test_a_full_disk_is_told_with_what_is_free_and_what_to_do(make_job) -> None:
    job = make_job("overflow")
    with pytest.raises(
        StepFailed, match=r"overflow: OSError: .*No space left on device; \d+ bytes are free at .*make room, or"
    ) as told:
        run_child(job, on_metrics=lambda _: None)
    assert str(job.folder) in str(told.value)


def test_a_killed_child_is_named_so_with_the_end_of_its_log(make_job) -> None:
    with pytest.raises(StepFailed, match=r"(?s)killed.*memory.*last words"):
        run_child(make_job("vanish"), on_metrics=lambda _: None)


def test_it_is_said_whether_the_kernel_killed_for_want_of_memory(
    make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = tmp_path / "vmstat"
    counts.write_text("nr_free_pages 7\noom_kill 4\n")
    monkeypatch.setattr(supervision, "VMSTAT", counts)
    with pytest.raises(
        StepFailed, match="counts no kills for want of memory while it ran: a person or another program"
    ):
        run_child(make_job("vanish"), on_metrics=lambda _: None)
    with pytest.raises(
        StepFailed, match="kernel of this machine counts 1 kills for want of memory while it ran; the last lines"
    ):
        run_child(make_job("vanish"), on_metrics=lambda _: counts.write_text("oom_kill 5\n") and None)
    monkeypatch.setattr(supervision, "VMSTAT", tmp_path / "none")  # no Linux
    with pytest.raises(StepFailed, match=r"\(see `dmesg`\); the last lines"):
        run_child(make_job("vanish"), on_metrics=lambda _: None)


def test_a_killed_child_is_told_with_what_its_preflight_found_about_memory(make_job) -> None:
    job = make_job("vanish")
    memory = {"microbatch_tokens": 2048, "free_bytes": 4 * 2**30, "estimated_bytes": 2**30, "optimiser_bytes": 2**30}
    job.output.mkdir()
    (job.output / "preflight.json").write_text(json.dumps({"memory": memory}))
    with pytest.raises(
        StepFailed, match=r"SIGKILL.*2048 tokens was to take 1.00 GiB .*4.00 GiB were free.*lower runtime"
    ):
        run_child(job, on_metrics=lambda _: None)
    (job.output / "preflight.json").write_text(json.dumps({"memory": memory | {"peak_bytes": 3 * 2**29}}))
    with pytest.raises(StepFailed, match=r"took 1.50 GiB beside weights and 1.00 GiB of the optimiser's state"):
        run_child(job, on_metrics=lambda _: None)


def test_a_killed_rank_is_told_with_what_the_preflight_found_about_memory_too(make_job) -> None:
    job = make_job("bereft")
    memory = {"microbatch_tokens": 2048, "free_bytes": 4 * 2**30, "peak_bytes": 3 * 2**29, "optimiser_bytes": 2**30}
    job.output.mkdir()
    (job.output / "preflight.json").write_text(json.dumps({"memory": memory}))
    told = r"RankDied: rank 1 of 2: .*SIGKILL.*2048 tokens took 1.50 GiB beside weights .*4.00 GiB were free.*lower runtime"
    with pytest.raises(StepFailed, match=told):
        run_child(job, on_metrics=lambda _: None)


def test_an_interrupt_lets_the_child_save(make_job) -> None:
    job = make_job("polite")

    def interrupt(_: list[dict[str, float]]) -> None:
        if (job.work / "started").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(job, on_metrics=interrupt)
    assert (job.work / "saved").exists()


def test_a_child_that_ignores_the_signal_is_killed_with_its_own_child(
    make_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "STOP_SECONDS", 1.0)
    job = make_job("stubborn")

    def interrupt(_: list[dict[str, float]]) -> None:
        if (job.work / "grandchild").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(job, on_metrics=interrupt)
    grandchild = int((job.work / "grandchild").read_text())
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_a_child_whose_parent_is_killed_saves_and_ends(make_job, tmp_path: Path) -> None:
    job = make_job("polite")
    script = f"""
from pathlib import Path
from tasks.child import ChildJob, run_child
run_child(ChildJob("trial", "polite", {{}}, {{}}, {{}}, Path({str(job.folder)!r}), {dict(job.environment)!r}), on_metrics=lambda _: None)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    wait_for(job.work / "started")
    (child,) = psutil.Process(parent.pid).children()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(job.work / "saved")
    child.wait(timeout=20)


def test_following_a_file_that_is_cut_shorter_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = follow(path)
    assert next(lines) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in next(lines)] == [1, 2]
    assert next(lines) == []
    path.write_bytes(b'{"step": 1}\n')
    assert [line["step"] for line in next(lines)] == [1]
    with path.open("ab") as file:
        file.write(b'{"step": 3}\n')
    assert [line["step"] for line in next(lines)] == [3]


def test_following_a_file_that_was_cut_and_has_grown_past_its_old_end_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = follow(path)
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    next(lines)
    path.write_bytes(b'{"step": 1}\n{"step": 22, "time": 1.5}\n{"step": 3}\n')
    assert [line["step"] for line in next(lines)] == [1, 22, 3]


def test_a_broken_line_is_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a line that a cut one grew into, bytes that are no text, JSON that is no object; the work they tell of goes on."""
    path = tmp_path / "metrics.jsonl"
    lines = follow(path)
    path.write_bytes(b'{"step": 1}\n{"step": 2, "ti{"step": 3}\n\x00\xff\x00\n{"step": 4}\n')
    assert [line["step"] for line in next(lines)] == [1, 4]
    with path.open("ab") as file:
        file.write(b'17\n\n{"step": 5}\n')
    assert [line["step"] for line in next(lines)] == [5]
    (record,) = caplog.records
    assert (
        record.levelname == "WARNING" and f'{path}: left out b\'{{"step": 2, "ti{{"step": 3}}\'' in record.getMessage()
    )
