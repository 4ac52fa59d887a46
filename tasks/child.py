"""Supervision of a compute child: start it, follow its metrics file, end its whole group whatever happens here.

The child holds the reading end of a pipe. When this process dies, however it dies, the pipe closes and the child ends
itself; when this process is told to stop, it passes the signal on and gives the child time to save. Call this directly,
never through a thread: Prefect delivers a cancellation to the main thread alone.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.job import EXIT_CANNOT_WRITE, EXIT_INTERRUPTED, EXIT_USER_ERROR, METRICS_FILE, describe_exit, write_json
from training.preflight.findings import FILE as PREFLIGHT_FILE

logger = logging.getLogger("varflow.child")
LISTEN_SECONDS = 0.5
STOP_SECONDS = 25.0  # below the 30 s after which Prefect's worker kills this process
LOG_TAIL_LINES = 25
VMSTAT = Path("/proc/vmstat")  # counts of the kernel since the machine started
NO_SPACE = os.strerror(errno.ENOSPC)


class StepFailed(Exception):  # noqa: N818 - what the user reads
    """A step could not be done; the message is whole and needs no traceback."""


class UserError(StepFailed, ValueError):
    """The step refused its config or its inputs."""


class InputChanged(StepFailed):
    """An input was not what the plan says, or is no more: nothing that was made of it may be kept."""


@dataclass(frozen=True)
class ChildJob:
    """What a child is to do; see training.job for the file it becomes."""

    package: str  # training | evaluation
    name: str
    config: dict[str, Any]
    runtime: dict[str, Any]
    inputs: Mapping[str, Path]
    folder: Path  # holds job.json, log.txt, output/, work/; one child at a time
    environment: Mapping[str, str]
    stdin: str = field(default="", repr=False)  # an endpoint's key comes so: it is in no file, list or environment

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def work(self) -> Path:
        return self.folder / "work"


def run_child(
    job: ChildJob, *, keep_fds: tuple[int, ...] = (), on_metrics: Callable[[list[dict[str, float]]], None]
) -> None:
    """Run a job to its end; raise UserError or StepFailed with the child's own words otherwise.

    `on_metrics` gets the new lines of `output/metrics.jsonl`, or an empty list when there are none, twice a
    second. `keep_fds` are inherited: a lock held through one lasts as long as the child lives.
    """
    job_file = job.folder / "job.json"
    write_json(
        job_file,
        {
            "job": job.name,
            "config": job.config,
            "runtime": job.runtime,
            "inputs": {name: str(path) for name, path in job.inputs.items()},
            "output": str(job.output),
            "work": str(job.work),
        },
    )
    lines = follow(job.output / METRICS_FILE)
    killed_before = count_memory_kills()
    reader, writer = os.pipe()
    try:
        with (job.folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", job.package, str(job_file), str(reader)],
                stdin=subprocess.PIPE if job.stdin else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(reader, *keep_fds),
                env=dict(job.environment),
                cwd=job.folder,
            )
        os.close(reader)
        try:
            hand_over(child, job.stdin)
            while child.poll() is None:
                on_metrics(next(lines))
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LISTEN_SECONDS)
            on_metrics(next(lines))
        finally:
            end_group(child)
    finally:
        os.close(writer)
    _raise_for_exit(job, child.returncode, killed_before=killed_before)


def count_memory_kills() -> int | None:
    """Return how many processes this machine's kernel has killed for want of memory since it began; None where it does not say."""
    if not VMSTAT.exists():
        return None
    counts = dict(line.split() for line in VMSTAT.read_text().splitlines())
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def hand_over(child: "subprocess.Popen[bytes]", text: str) -> None:
    """Write to a child that was given a pipe for it; one that is gone already says why itself."""
    if child.stdin is not None:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(text.encode())


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """End the child's whole process group: SIGTERM, time to save, SIGKILL. Returns when no process of it is left."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second interrupt while waiting must not leave the group behind
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what the leader may have left


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # none left; on macOS a group of zombies gives EPERM
        return


def follow(path: Path) -> Iterator[list[dict[str, float]]]:
    """Yield, for ever, the whole lines that came to a JSON-lines file since the last time, from its beginning on.

    A file cut shorter (a resumed run drops the steps after its checkpoint) is told again from its beginning: by the time that is
    seen it may have grown past the old end, and whoever listens may hear the same line twice. A line that is no JSON object, as a
    machine that lost power leaves them, is left out with one warning a file: figures are not worth the work that they tell of.
    """
    offset, last, warned = 0, b"", False
    while True:
        lines: list[dict[str, float]] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset - len(last))
                if file.read(len(last)) != last:
                    offset, last = 0, b""
                file.seek(offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                offset += len(whole)
                last = whole.splitlines(keepends=True)[-1]
                for line in whole.split(b"\n")[:-1]:
                    found = parse_line(line)
                    if found is not None:
                        lines.append(found)
                    elif not warned:
                        warned = True
                        logger.warning(
                            "%s: left out %r; expected one JSON object a line; more like it are left out in silence",
                            path,
                            line[:80],
                        )
        yield lines


def parse_line(line: bytes) -> dict[str, float] | None:
    """Return the object of a line of JSON, None where it holds none."""
    try:
        found = json.loads(line)
    except ValueError:  # also bytes that are no UTF-8
        return None
    return found if isinstance(found, dict) else None


def _raise_for_exit(job: ChildJob, status: int, *, killed_before: int | None) -> None:
    if status == 0:
        return
    log = job.folder / "log.txt"
    error_file = job.work / "error.json"
    if error_file.exists():
        error = json.loads(error_file.read_text())
        if status == EXIT_USER_ERROR:
            raise UserError(f"{job.name}: {error['message']}")
        killed = describe_exit(-signal.SIGKILL) in error["message"]  # one of several ranks
        found = _describe_kill(job, killed_before) if killed else ""
        if NO_SPACE in error["message"]:
            found = f"; {_advise_room(job)}"
        raise StepFailed(f"{job.name}: {error['type']}: {error['message']}{found}\nlog: {log}")
    if status == EXIT_CANNOT_WRITE:
        raise StepFailed(f"{job.name}: {NO_SPACE}: {_advise_room(job)}")
    if status == EXIT_INTERRUPTED:
        raise StepFailed(f"{job.name}: stopped on request; run the same command again to go on from its checkpoint")
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    found = _describe_kill(job, killed_before) if status == -signal.SIGKILL else ""
    raise StepFailed(f"{job.name}: {describe_exit(status)}{found}; the last lines of {log}:\n{tail}")


def _advise_room(job: ChildJob) -> str:
    """Say what to do about a full disk."""
    return (
        f"{shutil.disk_usage(job.folder).free} bytes are free at {job.folder}; make room, or set VARFLOW_HOME to a folder on another "
        "disk, and run the same command again"
    )


def _describe_kill(job: ChildJob, killed_before: int | None) -> str:
    """Say whether it was the kernel, by what it counts, and what the preflight found about memory."""
    killed = count_memory_kills()
    told = ""
    if killed is not None and killed_before is not None:
        by_kernel = killed - killed_before
        told = f"; the kernel of this machine counts {by_kernel or 'no'} kills for want of memory while it ran" + (
            "" if by_kernel else ": a person or another program did"
        )
    return told + _describe_probe(job)


def _describe_probe(job: ChildJob) -> str:
    """Say what the preflight found about memory, where a child that was killed got that far."""
    path = job.output / PREFLIGHT_FILE
    memory = json.loads(path.read_text())["memory"] if path.is_file() else {}
    if not memory:
        return ""
    took, how = (memory["peak_bytes"], "took") if "peak_bytes" in memory else (memory["estimated_bytes"], "was to take")
    return (
        f"; before training a micro-batch of {memory['microbatch_tokens']} tokens {how} {took / 2**30:.2f} GiB beside weights and "
        f"{memory['optimiser_bytes'] / 2**30:.2f} GiB of the optimiser's state, {memory['free_bytes'] / 2**30:.2f} GiB were free: if it "
        "was memory, lower runtime.microbatch_tokens"
    )
