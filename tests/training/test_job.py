"""The life of a child process, with real processes: exit statuses, error file, stop by signal and by the parent's death."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from training.job import Job, lock_work, read_json_lines, run_job

# A job that starts a child of its own, says so, counts until it is told to stop, and saves how far it came.
SLOW_JOB = """
import subprocess, sys, time
from training.job import Job, main, write_json

def count(job: Job) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL)
    n = 0
    while True:
        n += 1
        write_json(job.work / "count.json", {"n": n, "child": child.pid})
        job.check_stop()
        time.sleep(0.02)

def ignore(job: Job) -> None:
    write_json(job.work / "count.json", {"n": 0, "child": 0})
    while True:
        time.sleep(0.02)

def fail(job: Job) -> None:
    raise RuntimeError("the disk is on fire")

sys.exit(main({"count": count, "ignore": ignore, "fail": fail}, sys.argv[1:]))
"""


def write_job(folder: Path, name: str, **changes: Any) -> Path:
    job = {
        "job": name,
        "config": {},
        "runtime": {},
        "inputs": {},
        "output": str(folder / "o"),
        "work": str(folder / "w"),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job | changes))
    return path


def read_error(folder: Path) -> dict[str, str]:
    error: dict[str, str] = json.loads((folder / "w" / "error.json").read_text())
    return error


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def run_training(job: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "training", str(job)], capture_output=True, text=True, timeout=120)


def start_slow(folder: Path, name: str, *, lifeline: int | None = None) -> "subprocess.Popen[str]":
    arguments = [str(write_job(folder, name)), *([] if lifeline is None else [str(lifeline)])]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_JOB, *arguments],
        pass_fds=() if lifeline is None else (lifeline,),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_done_is_0_and_leaves_no_error(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Question {n}", "chosen": "A", "rejected": "B"} for n in range(50)]
    source.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "error.json").write_text('{"type": "ValueError", "message": "of an earlier attempt"}')
    done = run_training(write_job(tmp_path, "ingest", config={"responses": "support"}, inputs={"source": str(source)}))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["rows"] == 50
    assert not (tmp_path / "w" / "error.json").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ingets", {}, "no such job; got 'ingets', expected one of"),
        ("ingest", {"config": {"responses": "support"}, "inputs": {"source": "/absent"}}, "/absent: no such file or folder"),
        ("ingest", {"config": {"responses": "sampled"}}, "responses"),
        ("ingest", {"config": {"responses": "support", "heldout": 1}}, "heldout"),
    ],
)  # fmt: skip
def test_the_users_mistake_is_2_with_its_message(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    done = run_training(write_job(tmp_path, name, **changes))
    assert done.returncode == 2, done.stderr
    assert message in read_error(tmp_path)["message"]


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    values = [{"text": "a\u2028b\u2029c\x85d\x1ce\r\n"}, {"text": ""}]
    (tmp_path / "lines").write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    assert read_json_lines(tmp_path / "lines") == values


def test_the_summary_is_on_disk_after_all_that_it_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("train", {}, {}, {}, output=tmp_path / "o", work=tmp_path / "w")
    for path in (job.output / "model.safetensors", job.output / "adapter" / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    job.work.mkdir()
    flushed: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(Path(f"/proc/self/fd/{file}").readlink().name), sync(file)))  # fmt: skip
    job.write_summary({"steps": 1})
    assert flushed[-1] == "summary.json.partial"
    assert {"model.safetensors", "config.json", "adapter", "o"} <= set(flushed[:-1])


def test_of_two_at_once_the_second_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    job_file = write_job(tmp_path, "ingest", config={"responses": "support"}, inputs={"source": "/absent"})
    job = Job.read(job_file)
    (held,) = lock_work(job)
    ranks = lock_work(job, [1, 2])  # of another start, say, each its own
    assert len(ranks) == 2 and lock_work(job, [2]) == lock_work(job, [3, 0]) == []
    (tmp_path / "w" / "error.json").write_text("of the first")
    done = run_training(job_file)
    assert done.returncode == 2 and f"another process is at work in {tmp_path / 'w'}" in done.stderr
    assert (tmp_path / "w" / "error.json").read_text() == "of the first"
    held.close()
    assert run_training(job_file).returncode == 2 and "/absent" in read_error(tmp_path)["message"]


def test_memory_that_is_refused_is_named_with_what_helps(tmp_path: Path) -> None:
    job = Job.read(write_job(tmp_path, "train"))
    assert run_job({"train": lambda job: torch.empty(2**50)}, job) == 1  # type: ignore[dict-item,return-value]
    told = read_error(tmp_path)
    assert told["type"] == "MemoryError" and "you tried to allocate 4503599627370496 bytes" in told["message"]
    assert "lower runtime.microbatch_tokens" in told["message"]


def test_our_fault_is_1_with_its_message(tmp_path: Path) -> None:
    process = start_slow(tmp_path, "fail")
    assert process.communicate(timeout=60)[1].endswith("RuntimeError: the disk is on fire\n")
    assert process.returncode == 1
    assert read_error(tmp_path) == {"type": "RuntimeError", "message": "the disk is on fire"}


def test_a_call_without_job_file_says_how() -> None:
    done = subprocess.run([sys.executable, "-m", "training"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "usage: python -m training JOB.json [LIFELINE_FD]\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_where_it_can_go_on(tmp_path: Path, number: signal.Signals) -> None:
    process = start_slow(tmp_path, "count")
    wait_for(tmp_path / "w" / "count.json", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    child = json.loads((tmp_path / "w" / "count.json").read_text())["child"]
    os.kill(child, signal.SIGKILL)  # its parent lives and minds the group; here that is the test
    assert process.returncode == 75
    assert "stopped on request" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "w" / "error.json").exists()


def test_the_parents_death_stops_it_and_its_whole_group(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    process = start_slow(tmp_path, "count", lifeline=read_end)
    os.close(read_end)
    wait_for(tmp_path / "w" / "count.json", process)
    child = psutil.Process(json.loads((tmp_path / "w" / "count.json").read_text())["child"])
    assert process.poll() is None and child.is_running()
    os.close(write_end)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive, "a grandchild outlived the job"
    assert json.loads((tmp_path / "w" / "count.json").read_text())["n"] > 0


def test_a_lifeline_that_closed_before_the_start_stops_it_too(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    process = start_slow(tmp_path, "count", lifeline=read_end)
    os.close(read_end)
    process.wait(timeout=60)
    assert json.loads((tmp_path / "w" / "count.json").read_text())["n"] < 100


def test_a_job_that_does_not_heed_the_parents_death_is_killed(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    folder = tmp_path
    script = SLOW_JOB.replace(
        "sys.exit(main", "import training.job; training.job.TEARDOWN_SECONDS = 0.5\nsys.exit(main"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(write_job(folder, "ignore")), str(read_end)],
        pass_fds=(read_end,),
        start_new_session=True,
    )
    os.close(read_end)
    wait_for(folder / "w" / "count.json", process)
    os.close(write_end)
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_ingest_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, training.__main__, training.data.ingest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
