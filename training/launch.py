"""One job on several ranks: torch's elastic agent starts those of its machine, and what ends one of them ends all.

`python -m training JOB.json` becomes the agent where the job asks for more than one rank; each rank is
`python -m training.launch JOB.json AGENT_PID`. The agent minds the parent's pipe and its signals as any child does, and
passes a stop on as the file `work/stop`; a rank whose agent is gone ends at once, since nobody holds the work folder for it
any more. A rank that fails writes `work/error.json`, the first one of all, and with it fails the job. One that has waited too
long for another asks all in `work/roll_call` where they are, and fails with what they say.

Where a rank had no room for a micro-batch, those of one machine are started again with smaller ones: what is trained does not depend
on them, and it goes on from the checkpoint. `work/microbatch.json` keeps the budget for later attempts that ask for the same.

Several machines: the same job file on each, but for `runtime.node_rank`, with `work` and `output` on a disk they share. The
agents meet at `runtime.rendezvous`, a port of machine 0, whose ranks are the first ones.
"""

import ctypes
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from training import distributed
from training.__main__ import JOBS
from training.config import Runtime
from training.job import (
    EXIT_CANNOT_WRITE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Interrupted,
    Job,
    describe_exit,
    end_group,
    heed_signals,
    run_job,
    write_json,
)

POLL_SECONDS = 0.1
MEETING_SECONDS = 600  # of several machines: until all have started the job
SHUTDOWN_SECONDS = 20  # from the first rank's end to the end of all; a parent that stops the job waits 25 s
SAME_TIME_SECONDS = 5  # ranks that ended so close to the first did so by themselves
FAILED_SECONDS = 10  # from a rank's error to the end of those that its agent does not reach, elsewhere or within NCCL
ANSWER_SECONDS = 5  # for all ranks to say where they are
PACKAGE = Path(__file__).parent
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class RankDied(RuntimeError):  # noqa: N818 - what the user reads
    """A rank was ended from outside."""


class RankSilent(RuntimeError):  # noqa: N818 - what the user reads
    """A rank let the others wait for longer than an exchange may take."""


def launch(job: Job, runtime: Runtime) -> None:
    """Run this machine's ranks of a job to their end. Interrupted when it was stopped, RankDied when one of them was killed.

    Where a rank has said in `work/error.json` why it failed, SystemExit with its status, unless smaller micro-batches may do.
    """
    if runtime.node_rank == 0:  # before the others meet it, so that none of them finds an earlier attempt's
        stop_file(job).unlink(missing_ok=True)
        shutil.rmtree(roll_folder(job), ignore_errors=True)
    # It would warn that it gets no signals on a thread of its own; they are for this thread to mind.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    while failures := run_agent(job, runtime):
        smaller = read_smaller(job, failures)
        if smaller is not None:
            write_json(budget_file(job), {"asked": runtime.microbatch_tokens, "microbatch_tokens": smaller})
        if smaller is None or runtime.nodes > 1 or job.stop.is_set():
            raise_failure(job, failures, ranks=runtime.world_size)
        sys.stderr.write(f"{read_error(job)['message']}: all ranks begin again from the checkpoint, with so many\n")
        (job.work / "error.json").unlink()


def run_agent(job: Job, runtime: Runtime) -> Mapping[int, ProcessFailure]:
    """Run this machine's ranks once and return how some of them failed; nothing where all have ended well."""
    agent = Agent(job, runtime)
    agent.start()
    while agent.is_alive():
        if job.stop.is_set():
            stop_file(job).touch()
        agent.join(POLL_SECONDS)
    if agent.error is not None:
        raise agent.error
    return agent.failures


class Agent(threading.Thread):
    """Torch's agent, away from the main thread, whose signals it would take for itself."""

    def __init__(self, job: Job, runtime: Runtime) -> None:
        super().__init__(name="elastic agent", daemon=True)
        self.failures: Mapping[int, ProcessFailure] = {}
        self.error: Exception | None = None
        self._runtime = runtime
        self._arguments = ["-m", "training.launch", str(job.file), str(os.getpid())]
        meeting: dict[str, Any] = {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "127.0.0.1",
        }
        if runtime.rendezvous is not None:
            meeting = {
                "run_id": hashlib.sha256(json.dumps([job.name, job.config]).encode()).hexdigest(),  # the same for all
                "rdzv_backend": "static",
                "rdzv_endpoint": runtime.rendezvous,
                "rdzv_configs": {"rank": runtime.node_rank, "timeout": MEETING_SECONDS},
            }
        self._config = LaunchConfig(
            min_nodes=runtime.nodes,
            max_nodes=runtime.nodes,
            nproc_per_node=runtime.ranks,
            **meeting,
            max_restarts=0,  # whoever runs the job starts it again, from its checkpoint
            monitor_interval=POLL_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=str(job.work / "ranks")),
            shutdown_timeout=SHUTDOWN_SECONDS,
        )

    def run(self) -> None:
        """Start the ranks and wait for their end."""
        try:
            launch_agent(self._config, sys.executable, self._arguments)
        except ChildFailedError as error:
            self.failures = error.failures
        except DistNetworkError as error:
            self.error = RuntimeError(
                f"runtime.rendezvous: machine {self._runtime.node_rank} of {self._runtime.nodes} did not meet the others at "
                f"{self._runtime.rendezvous} within {MEETING_SECONDS} s ({str(error).splitlines()[0]}); expected the same job started on "
                "every machine, and a free port of machine 0 that the others reach; run the same command again"
            )
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            self.error = error


def find_killed(failures: Mapping[int, ProcessFailure], *, told: bool) -> dict[int, int]:
    """Return the ranks that were killed, with their status. Later, or by SIGTERM, it was the agent that ended them; by SIGABRT, where another
    has told what it failed of, NCCL, which aborts who waits for it."""
    first = min(failure.timestamp for failure in failures.values())
    by_us = {-signal.SIGTERM, -signal.SIGABRT} if told else {-signal.SIGTERM}
    return {
        rank: failure.exitcode
        for rank, failure in failures.items()
        if failure.exitcode < 0 and failure.exitcode not in by_us and failure.timestamp <= first + SAME_TIME_SECONDS
    }


def read_smaller(job: Job, failures: Mapping[int, ProcessFailure]) -> int | None:
    """Return the budget of micro-batches that a rank without room asks for; None where ranks failed of something else."""
    error = read_error(job)
    smaller: int | None = None if find_killed(failures, told=bool(error)) else error.get("microbatch_tokens")
    return smaller


def read_error(job: Job) -> dict[str, Any]:
    """Return what a rank has failed of in its words; nothing where none has said it."""
    path = job.work / "error.json"
    return json.loads(path.read_text()) if path.exists() else {}


def budget_file(job: Job) -> Path:
    """Return the file that tells with which budget of tokens a micro-batch ranks go on that had no room for what was asked."""
    return job.work / "microbatch.json"


def with_budget(job: Job) -> Job:
    """Return the job with the budget that an earlier attempt came to, where it asks for as much as that one did."""
    path, asked = budget_file(job), Runtime.model_validate(job.runtime).microbatch_tokens
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("asked") != asked:
        return job
    return replace(job, runtime=job.runtime | {"microbatch_tokens": found["microbatch_tokens"]})


def raise_failure(job: Job, failures: Mapping[int, ProcessFailure], *, ranks: int) -> None:
    """Raise what the first of the failed ranks failed of; the others failed because it was gone."""
    error_file = job.work / "error.json"
    killed = find_killed(failures, told=error_file.exists())
    statuses = {failure.exitcode for failure in failures.values()}
    if killed:
        error_file.unlink(missing_ok=True)  # of a rank that missed the killed one
        rank, status = min(killed.items())
        waited = (
            ", as NCCL ends one that waited for another in vain or whose GPU failed: the log says which"
            if status == -signal.SIGABRT
            else ""
        )
        raise RankDied(
            f"rank {rank} of {ranks}: {describe_exit(status)}{waited}; the other ranks were ended; run the same command again to go "
            "on from the checkpoint"
        )
    if error_file.exists():
        raise SystemExit(EXIT_USER_ERROR if EXIT_USER_ERROR in statuses else 1)
    if EXIT_CANNOT_WRITE in statuses:
        raise SystemExit(EXIT_CANNOT_WRITE)
    if EXIT_INTERRUPTED in statuses or job.stop.is_set():
        raise Interrupted(job.name)
    rank, failure = min(failures.items())
    raise RuntimeError(f"rank {rank} of {ranks}: {describe_exit(failure.exitcode)}")


def stop_file(job: Job) -> Path:
    """Return the file whose presence tells ranks to stop."""
    return job.work / "stop"


def roll_folder(job: Job) -> Path:
    """Return the folder whose presence asks every rank where it is; there they answer."""
    return job.work / "roll_call"


def watch_agent(agent: int, job: Job) -> None:
    """Stop the job when the stop file appears, answer a roll call; end this process at once when the agent is gone, and soon after another
    rank has said what the job failed of: on another machine, or waiting for a GPU, this one may not see it for minutes."""

    def watch() -> None:
        answered, failed = False, 0
        while os.getppid() == agent and failed * POLL_SECONDS < FAILED_SECONDS:
            failed += (job.work / "error.json").exists()
            if stop_file(job).exists():
                job.stop.set()
            if not answered and roll_folder(job).exists():
                answered = True
                answer_roll(job)
            time.sleep(POLL_SECONDS)
        if os.getppid() == agent:
            os._exit(1)
        end_group()

    threading.Thread(target=watch, name="agent's life", daemon=True).start()


def die_with_agent() -> None:
    """Let the kernel end this process when its agent is gone: stopped, it could not see that. Only Linux does so."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def answer_roll(job: Job) -> None:
    """Write where in this package the main thread is, and whether it waits there for other ranks."""
    ident = threading.main_thread().ident
    assert ident is not None
    stack = traceback.extract_stack(sys._current_frames()[ident])
    number, place = find_place(stack)
    asks = stack[number].filename == __file__  # has waited itself
    waits = asks or any("/torch/distributed/" in frame.filename for frame in stack[number + 1 :])
    with suppress(OSError, ValueError):  # a full disk, or no rank any more: then it is no answer
        write_json(roll_folder(job) / f"{dist.get_rank()}.json", {"place": place, "waits": waits})


def find_place(stack: traceback.StackSummary) -> tuple[int, str]:
    """Return the innermost place of a stack in this package, exchanges themselves left out: its number, and how a person reads it."""
    files = {str(path) for path in PACKAGE.rglob("*.py")} - {distributed.__file__}
    number = max(n for n, frame in enumerate(stack) if frame.filename in files)
    frame = stack[number]
    return number, f"{Path(frame.filename).relative_to(PACKAGE.parent)}:{frame.lineno}, {frame.name}"


def name_silent(run: Callable[[Job], None], job: Job) -> None:
    """Run a job; where it fails because an exchange took too long, raise RankSilent with the rank that did not come to it."""
    try:
        run(job)
    except RuntimeError as error:
        if "imed out" not in str(error) or not dist.is_initialized():  # gloo says no more than that, and not of whom
            raise
        _, place = find_place(traceback.extract_tb(error.__traceback__))
        raise RankSilent(
            f"rank {dist.get_rank()} of {dist.get_world_size()} waited for another at {place} in vain "
            f"({str(error).splitlines()[0]}); {describe_roll(call_roll(job), size=dist.get_world_size())}; expected all to come there; "
            "run the same command again to go on from the checkpoint"
        ) from error


def call_roll(job: Job) -> dict[int, dict[str, Any]]:
    """Ask all ranks where they are and return what they answer in time, by rank."""
    folder, begin = roll_folder(job), time.monotonic()
    folder.mkdir(exist_ok=True)
    answers: list[Path] = []
    while len(answers) < dist.get_world_size() and time.monotonic() < begin + ANSWER_SECONDS:
        time.sleep(POLL_SECONDS)
        answers = list(folder.glob("*.json"))
    return {int(path.stem): json.loads(path.read_text()) for path in answers}


def describe_roll(answers: Mapping[int, Mapping[str, Any]], *, size: int) -> str:
    """Say which of the ranks are to blame: those that do not answer, or else those that do not wait for others."""
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        named = ", ".join(map(str, silent))
        return f"no answer from rank {named}: its process is stopped or has ended, or its machine is gone"
    busy = [f"rank {rank} is at {answer['place']}" for rank, answer in sorted(answers.items()) if not answer["waits"]]
    return "; ".join(busy) if busy else "all wait for each other: what connects their machines is gone"


def run_rank(argv: list[str]) -> int:
    """Run the job file `argv[0]` as a rank of the agent with process id `argv[1]`; return the exit status."""
    job = with_budget(Job.read(Path(argv[0])))
    heed_signals(job.stop)
    die_with_agent()
    watch_agent(int(argv[1]), job)
    return run_job({name: partial(name_silent, run) for name, run in JOBS.items()}, job)


if __name__ == "__main__":
    status = run_rank(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # a process group whose other ranks are gone may wait for them on its way out
