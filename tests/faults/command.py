"""The command as a user starts it, in processes of its own, and what can be seen of it from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra import records
from infra.records import Record
from infra.settings import Settings
from infra.store import Store

CALL = (  # a job that a shell put into the background ignores SIGINT, and so would all that it starts
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from flows.cli import main; main()"
)
FOREIGN = ("VARFLOW_", "PREFECT_", "MLFLOW_", "AWS_")
PATIENCE_SECONDS = 840.0  # of a busy machine; nothing here asserts how long something took
BENCHMARK = {
    "name": "mmlu_part", "tasks": ["mmlu_elementary_mathematics"], "num_fewshot": 0, "metric": "acc", "limit": 2,
    "max_length": 1024,
}  # fmt: skip
SMALL = {
    "ingest.limit": 32,
    "heldout.limit": 4,
    "heldout.max_new_tokens": 4,
    "suite.benchmarks": [BENCHMARK],
    "gate.margins": {"mmlu_part": 0.35},
}
"""What shrinks the recipe `smoke` further: every kind of step is still there."""


def words_of(changes: Mapping[str, Any], *, below: str = "") -> list[str]:
    """Return `--set` words for changes; `below` is the field under which the recipe lies."""
    return [word for key, value in changes.items() for word in ("--set", f"{below}{key}={json.dumps(value)}")]


def small(*, below: str = "", **changes: Any) -> list[str]:
    """Return the words of the small recipe with more changes; `train__seed=1` stands for `train.seed=1`."""
    return words_of(SMALL | {key.replace("__", "."): value for key, value in changes.items()}, below=below)


@dataclass(frozen=True)
class Command:
    """`varflow` with its settings; `variables` come last, as a user would export them."""

    settings: Settings
    folder: Path

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return this machine's environment with these settings in place of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return kept | {"OMP_NUM_THREADS": "1"} | self.settings.own_environment() | variables

    def start(self, *words: str, **variables: str) -> "subprocess.Popen[str]":
        """Start the command; its output goes to pipes."""
        return subprocess.Popen(
            [sys.executable, "-c", CALL, *words],
            cwd=self.folder, env=self.environment(variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run the command to its end."""
        return finish(self.start(*words, **variables))

    def ask(self, *words: str, **variables: str) -> dict[str, Any]:
        """Run the command with --json and return what it says; it has to succeed."""
        done = self.run(*words, "--json", **variables)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return dict(json.loads(done.stdout))

    def refuse(self, *words: str, **variables: str) -> str:
        """Run the command, which has to refuse in one message without a traceback; return that message."""
        done = self.run(*words, **variables)
        told = done.stderr[done.stderr.rfind("varflow: ") :]
        assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
        assert done.stderr.count("varflow: ") == 1 and told.count("\n") <= 8, done.stderr
        assert "Traceback" not in done.stderr + done.stdout and "unexpected" not in told, done.stderr
        assert done.stdout == "", done.stdout
        return told


def finish(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    """Wait for a command that was started."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def killed_at_the_end(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Leave nothing of a command behind when a test fails between its start and its end."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_until(what: str, found: Callable[[], Any], *, seconds: float = PATIENCE_SECONDS) -> Any:
    """Return what `found` gives as soon as it is true; fail when that never comes."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(0.05)
    return value


def find_children(home: Path, step: str = "") -> list[psutil.Process]:
    """Return the compute children at work in this home (for a kind of step), known by their job file."""
    start = str(home / "work" / step)
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            word.startswith(start) and word.endswith("/job.json") for word in words
        ):
            found.append(process)
    return found


def await_child(process: "subprocess.Popen[str]", home: Path, step: str, *, metric_lines: int = 0) -> psutil.Process:
    """Wait for the child of a step and for some lines of its metrics; fail when the command ends before."""

    def look() -> psutil.Process | None:
        assert process.poll() is None, finish(process).stderr
        for child in find_children(home, step):
            if count_lines(Path(child.cmdline()[-2]).parent / "output" / "metrics.jsonl") >= metric_lines:
                return child
        return None

    return wait_until(f"a child of {step}", look)


def count_lines(path: Path) -> int:
    """Return the whole lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def await_no_children(home: Path) -> None:
    """Wait until no compute child is left in this home: it may save for a minute, and no longer."""
    wait_until("the end of all children", lambda: not find_children(home), seconds=120.0)


def read_records(store: Store) -> dict[str, tuple[str, str]]:
    """Return (attempt, time of writing) of every record, by step/fingerprint."""
    return {f"{r.step}/{r.fingerprint}": (r.attempt, r.created) for r in records.iterate(store)}


def record_of(store: Store, outcome: Mapping[str, Any], step: str) -> Record:
    """Return the record of the last step of a kind that an outcome lists."""
    fingerprint = [item["fingerprint"] for item in outcome["steps"] if item["step"] == step][-1]
    found = records.find(store, step=step, fingerprint=fingerprint)
    assert found
    return found


@contextmanager
def prefect_at(settings: Settings) -> Iterator[None]:
    """Point Prefect's client in this process at the server of a stack, for a while."""
    with temporary_settings({PREFECT_API_URL: settings.prefect_api_url}):
        yield
