"""The life of a child process: read a job, run it, be stoppable, leave files and an exit status.

A job file is one JSON object::

    {"job": "train", "config": {...}, "runtime": {...}, "inputs": {"name": "/path"}, "output": "/dir", "work": "/dir"}

`output` becomes the artifact. `work` is scratch that outlives a kill: a second start with the same identity finds in both
what the first one left, and goes on from there. The parent learns of the work through files alone: `output/metrics.jsonl`
(see training.metrics), `output/summary.json` and `work/hardware.json` at the end, `work/error.json` on failure.

Exit status: 0 done, 2 the user's mistake (error.json says which), 74 the disk takes no more, 75 stopped on request and
resumable, anything else a fault.
"""

import errno
import fcntl
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

EXIT_USER_ERROR = 2
EXIT_CANNOT_WRITE = 74  # EX_IOERR: not even error.json could be written, for want of room
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again, the work goes on from its checkpoint
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HARDWARE_FILE = "hardware.json"
METRICS_FILE = "metrics.jsonl"  # of the output, as the next
ANSWERS_FILE = "answers.jsonl"
CPU = {"device": "cpu", "devices": 1}
TEARDOWN_SECONDS = 60.0  # from the parent's death to the end of the whole process group, checkpoint included


class OutOfMemory(RuntimeError):  # noqa: N818 - what the user reads
    """One of several ranks had no room for a micro-batch. All have to begin anew, from their checkpoint and with smaller ones: the others
    are in the middle of theirs, waiting for this one."""

    def __init__(self, message: str, *, microbatch_tokens: int) -> None:
        super().__init__(message)
        self.microbatch_tokens = microbatch_tokens  # the next smaller budget


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """Raised by a job that saw `stop` and has saved what it needs to go on."""


@dataclass(frozen=True)
class Job:
    """One unit of work for a child process. Paths are local."""

    name: str
    config: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, Path]
    output: Path
    work: Path
    file: Path | None = None  # where it was read from
    stop: threading.Event = field(default_factory=threading.Event, compare=False)

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read a job file and make its directories."""
        raw = json.loads(path.read_text())
        job = cls(
            name=raw["job"],
            config=raw["config"],
            runtime=raw["runtime"],
            inputs={name: Path(value) for name, value in raw["inputs"].items()},
            output=Path(raw["output"]),
            work=Path(raw["work"]),
            file=path.absolute(),
        )
        job.output.mkdir(parents=True, exist_ok=True)
        job.work.mkdir(parents=True, exist_ok=True)
        return job

    def check_stop(self) -> None:
        """Raise Interrupted when the parent asked to stop or died. Call where everything done so far is on disk."""
        if self.stop.is_set():
            raise Interrupted(self.name)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `output/summary.json`: the flat counts and figures that the record and the report show; and on what it was computed.

        Whoever finds it takes the output as it is, so all the rest is on disk before.
        """
        write_json(self.work / HARDWARE_FILE, describe_hardware())
        for path in [*self.output.rglob("*"), self.output]:
            flush(path)
        write_json(self.output / "summary.json", summary)


def describe_hardware() -> dict[str, Any]:
    """Return the device that this job computed on, as torch names it, and how many: one a rank. The ranks of a CPU share it."""
    torch = sys.modules.get("torch")  # a job without tensors does without
    if torch is None or not torch.cuda.is_initialized():
        return dict(CPU)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"device": torch.cuda.get_device_name(), "devices": ranks}


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. NaN and inf are refused."""
    with write_whole(path) as out:
        json.dump(value, out, indent=1, sort_keys=True, allow_nan=False)


@contextmanager
def write_whole(path: Path) -> Iterator[TextIO]:
    """Open a text file that is there whole or not at all: written under a temporary name, renamed when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines. Line feeds end them, and not what else parts lines in a text (U+2028, U+0085), which JSON
    writes as it is."""
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def name_refusal(error: Exception) -> Exception:
    """Return an error, or what to do about it where it is the refusal of memory by a CPU's allocator: a limit of the process, mostly, since
    the kernel itself would rather kill."""
    if "can't allocate memory" not in str(error):
        return error
    return MemoryError(
        f"no memory for a tensor ({str(error).splitlines()[0]}); expected room for it; lower runtime.microbatch_tokens or max_tokens, set "
        "runtime.activation_checkpointing, or raise what limits this process (`ulimit -v`)"
    )


def write_error(path: Path, error: Exception) -> None:
    """Write an error's type and message, and of OutOfMemory the smaller budget, unless another rank has written: what the first one
    failed of fails the others."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    smaller = {"microbatch_tokens": error.microbatch_tokens} if isinstance(error, OutOfMemory) else {}
    write_json(own, {"type": type(error).__name__, "message": str(error)} | smaller)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        pass
    finally:
        own.unlink()


def watch_parent(lifeline_fd: int, stop: threading.Event) -> threading.Event:
    """Set `stop` when the other end of the pipe closes, and end the process group if the job has not ended in time.

    Return the event that says the parent is gone: then nobody but this process can end what it started.
    """
    orphaned = threading.Event()

    def watch() -> None:
        while os.read(lifeline_fd, 1):
            pass
        orphaned.set()
        stop.set()
        timer = threading.Timer(TEARDOWN_SECONDS, end_group)
        timer.daemon = True
        timer.start()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return orphaned


def end_group() -> None:
    """End this process and all of its group, at once. A group that others lead is left alone: its leader minds it."""
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def heed_signals(stop: threading.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())


def describe_exit(status: int) -> str:
    """Say how a process ended that did not say so itself; a negative status is the signal that ended it."""
    if status == -signal.SIGKILL:
        return "its process was killed (SIGKILL): by hand, or by the kernel for want of memory (see `dmesg`)"
    if status < 0:
        return f"its process ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def main(
    jobs: Mapping[str, Callable[[Job], None]],
    argv: list[str],
    *,
    find_ranks: Callable[[Job], Sequence[int]] = lambda job: [0],
) -> int:
    """Run the job named in the job file `argv[0]`; `argv[1]`, if given, is the lifeline's file descriptor. `find_ranks` says which of a
    machine's ranks this process is, or starts."""
    job = Job.read(Path(argv[0]))
    heed_signals(job.stop)
    orphaned = watch_parent(int(argv[1]), job.stop) if len(argv) > 1 else threading.Event()
    ranks = find_ranks(job)
    try:
        locks = lock_work(job, ranks)  # held as long as they are open
    except OSError as refusal:
        if refusal.errno in NO_ROOM:
            return EXIT_CANNOT_WRITE
        raise
    if not locks:
        sys.stderr.write(
            f"{job.name}: another process is at work in {job.work}, got its lock; expected none; wait for its end, or stop it\n"
        )
        return EXIT_USER_ERROR
    if 0 in ranks:
        (job.work / "error.json").unlink(missing_ok=True)
    status = run_job(jobs, job)
    if orphaned.is_set():
        end_group()
    return status


def lock_work(job: Job, ranks: Sequence[int] = (0,)) -> list[IO[str]]:
    """Return the locked files of a job's work folder, to be kept open, one for each rank; none where another process has one of them.
    Machines that train together, and may see one folder, have their own."""
    machine, locks = job.runtime.get("node_rank", 0), list[IO[str]]()
    for rank in ranks:
        locks.append((job.work / f"job-{machine}{f'-{rank}' if rank else ''}.lock").open("a"))
        try:
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for lock in locks:
                lock.close()
            return []
    return locks


def run_job(jobs: Mapping[str, Callable[[Job], None]], job: Job) -> int:
    """Run the job and return the exit status; a failure's type and message go to `work/error.json`."""
    try:
        if job.name not in jobs:
            raise ValueError(f"job {job.name!r}: no such job; got {job.name!r}, expected one of {sorted(jobs)}")
        jobs[job.name](job)
    except Interrupted:
        sys.stderr.write(f"{job.name}: stopped on request; a rerun goes on from here\n")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last frame of the process: the parent is told, then it ends
        with suppress(OSError):  # a full disk takes no last words
            traceback.print_exc()
        try:
            write_error(job.work / "error.json", name_refusal(error))
        except OSError as refusal:
            if refusal.errno in NO_ROOM:
                return EXIT_CANNOT_WRITE
        return EXIT_USER_ERROR if isinstance(error, (ValueError, FileNotFoundError)) else 1
    return 0
