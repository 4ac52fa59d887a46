"""A job on two ranks, with real processes: whatever ends one of them ends all, says why, and the next start goes on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tasks.child import STOP_SECONDS, ChildJob, StepFailed, UserError, run_child
from tests.hosts import Host
from tests.training.test_sharding import assert_tokens
from training import train
from training.config import Runtime
from training.job import EXIT_INTERRUPTED, EXIT_USER_ERROR, Job
from training.launch import (
    ANSWER_SECONDS,
    SHUTDOWN_SECONDS,
    RankDied,
    describe_roll,
    launch,
    raise_failure,
    read_error,
    read_smaller,
    with_budget,
)

CONFIG = {
    "objective": "sft",
    "responses": "all",
    "batch_prompts": 4,
    "epochs": 24,
    "max_tokens": 96,
    "learning_rate": 3e-4,
}
NUM_STEPS = 72
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
PATIENCE_SECONDS = 30  # of ranks that are started with `impatient`
END_SECONDS = PATIENCE_SECONDS + ANSWER_SECONDS + SHUTDOWN_SECONDS + 60


@pytest.fixture
def write_job(tmp_path: Path, train_inputs: dict[str, str]) -> Callable[..., Path]:
    def write(name: str, **runtime: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shared = {"device": "cpu", "threads": 1, "microbatch_tokens": 64, "checkpoint_every_steps": 10}
        raw = {"job": "train", "config": CONFIG, "runtime": {**shared, **runtime}, "inputs": train_inputs}
        folders = {"output": str(folder / "output"), "work": str(folder / "work")}
        (folder / "job.json").write_text(json.dumps({**raw, **folders}))
        return folder / "job.json"

    return write


class Started:
    """A job's agent, its ranks, and the pipe they hang on."""

    def __init__(
        self,
        job_file: Path,
        *,
        num_ranks: int = 2,
        within: Sequence[str] = (),
        environment: Mapping[str, str] = {},
    ) -> None:
        self.folder, self.num_ranks = job_file.parent, num_ranks
        self.started = time.time()
        self.log = job_file.with_suffix(".log")
        reader, self.lifeline = os.pipe()
        with self.log.open("wb") as log:
            self.agent = subprocess.Popen(
                [*within, sys.executable, "-m", "training", str(job_file), str(reader)],
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=log,
                stderr=log,
                pass_fds=(reader,),
                start_new_session=True,
            )
        os.close(reader)

    def run_to(self, steps: int) -> None:
        """Wait until the metrics of this start tell of so many steps, and look at who works."""
        while self.last_step() < steps:
            assert self.agent.poll() is None, self.log.read_text()
            time.sleep(0.005)
        self.ranks = psutil.Process(self.agent.pid).children()
        assert len(self.ranks) == self.num_ranks

    def last_step(self) -> int:
        metrics = self.folder / "output" / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
        told = [json.loads(line) for line in lines[-2:] if line.endswith(b"\n")]
        return max((line["step"] for line in told if line["time"] > self.started), default=0)

    def end(self, *, within: int = 40) -> int:
        """Return the agent's exit status once it and all ranks are gone, which must not take long."""
        status = self.agent.wait(timeout=within)
        _, alive = psutil.wait_procs(self.ranks, timeout=5)
        assert not alive, "a rank outlived its agent"
        return status

    def error(self) -> dict[str, str]:
        error: dict[str, str] = json.loads((self.folder / "work" / "error.json").read_text())
        return error


def run_first(folder: Path, text: str) -> dict[str, str]:
    """Return the environment of processes that run some Python before all else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def impatient(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that gives the environment of processes whose exchanges wait for seconds only, and run more at their start."""

    def write(more: str = "") -> dict[str, str]:
        patience = f"import datetime, training.distributed\ntraining.distributed.TIMEOUT = datetime.timedelta(seconds={PATIENCE_SECONDS})\n"
        return run_first(tmp_path / "start", patience + more)

    return write


def set_config(job_file: Path, **changes: Any) -> None:
    raw = json.loads(job_file.read_text())
    job_file.write_text(json.dumps(raw | {"config": raw["config"] | changes}))


def saved_step(job_file: Path, *, files: int = 2) -> int:
    (newest,) = (job_file.parent / "work" / "checkpoints").glob("step-*[0-9]")
    assert len(list((newest / "tensors").iterdir())) == files
    return int(newest.name.removeprefix("step-"))


def test_whatever_ends_a_rank_ends_all_and_the_next_start_goes_on(write_job: Callable[..., Path]) -> None:
    job_file = write_job("ranks", ranks=2)

    stopped = Started(job_file)
    stopped.run_to(3)
    stopped.agent.send_signal(signal.SIGTERM)
    told = time.monotonic()
    assert stopped.end() == EXIT_INTERRUPTED
    assert time.monotonic() - told < STOP_SECONDS
    assert not (stopped.folder / "work" / "error.json").exists()
    after_stop = saved_step(job_file)
    assert 3 <= after_stop < NUM_STEPS

    killed = Started(job_file)
    killed.run_to(after_stop + 3)
    killed.ranks[1].send_signal(signal.SIGSTOP)  # and cannot look for its agent
    killed.agent.kill()
    assert killed.end() == -signal.SIGKILL
    assert after_stop <= saved_step(job_file) < NUM_STEPS

    bereft = Started(job_file)
    bereft.run_to(saved_step(job_file) + 3)
    bereft.ranks[1].send_signal(signal.SIGKILL)
    assert bereft.end() == 1
    assert bereft.error()["type"] == "RankDied"
    assert "of 2: its process was killed (SIGKILL)" in bereft.error()["message"]

    finished = Started(job_file)
    finished.run_to(saved_step(job_file) + 3)
    assert finished.end() == 0, finished.log.read_text()

    alone = write_job("alone")
    train.run(Job.read(alone))
    got, expected = (load_file(path.parent / "output" / "model.safetensors") for path in (job_file, alone))
    assert max((got[name] - tensor).abs().max().item() for name, tensor in expected.items()) < 1e-4
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    lines = (job_file.parent / "output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))


# A device that has less room after some steps, as when others take some of it: rank 1 finds out in the middle of a backward pass,
# where rank 0 waits for its part of a layer. The longest response alone has 41 tokens.
NO_ROOM = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from training.train import PolicyForward
    passes, values = 0, PolicyForward.values
    def refuse(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of")
    def with_less_room(self, model, micro, slope_B=None):
        global passes
        out = values(self, model, micro, slope_B)
        if out.weighted is not None:
            passes += 1
            if passes > 12 and out.num_tokens > 41:
                out.weighted.register_hook(refuse)
        return out
    PolicyForward.values = with_less_room
"""


def test_ranks_of_which_one_has_no_room_begin_again_from_the_checkpoint_with_smaller_micro_batches(
    tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    """To the weights of a device with room; a later attempt knows what was found, unless it asks for something else."""
    job_file = write_job("narrow", ranks=2, checkpoint_every_steps=2)
    narrow = Started(job_file, environment=run_first(tmp_path / "start", NO_ROOM))
    assert narrow.agent.wait(timeout=300) == 0, narrow.log.read_text()
    assert not (narrow.folder / "work" / "error.json").exists()
    told = [line for line in narrow.log.read_text().splitlines() if "begin again from the checkpoint" in line]
    assert len(told) == 1
    assert "rank 1 of 2: the device has no room for a micro-batch of at most 64 tokens (CUDA out of memory" in told[0]
    output = narrow.folder / "output"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    budgets = [line["train/microbatch_tokens"] for line in lines]
    assert budgets == sorted(budgets, reverse=True) and set(budgets) == {64, 32}
    assert budgets.index(32) % 2 == 0 and budgets.index(32) >= 2  # after a checkpoint
    assert json.loads((output / "summary.json").read_text())["microbatch_tokens"] == 32

    alone = write_job("alone")
    train.run(Job.read(alone))
    got, expected = (load_file(path.parent / "output" / "model.safetensors") for path in (job_file, alone))
    assert max((got[name] - tensor).abs().max().item() for name, tensor in expected.items()) < 1e-4

    job = Job.read(job_file)
    assert with_budget(job).runtime == job.runtime | {"microbatch_tokens": 32}
    other = replace(job, runtime=job.runtime | {"microbatch_tokens": 48})
    assert with_budget(other) == other


def test_ranks_that_torchrun_starts_train_the_model_of_the_jobs_own(write_job: Callable[..., Path]) -> None:
    """`torchrun --nproc-per-node 2 -m training JOB.json`: to the same bits, after twelve steps."""
    own, others = write_job("own", ranks=2), write_job("torchrun", ranks=2)
    for job_file in (own, others):
        set_config(job_file, epochs=4)
    started = Started(own)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "training", str(others)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert started.agent.wait(timeout=120) == 0, started.log.read_text()
    weights, steps = [], []
    for job_file in (own, others):
        output = job_file.parent / "output"
        weights.append((output / "model.safetensors").read_bytes())
        steps.append([json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert weights[0] == weights[1]
    assert steps == [list(range(1, 13))] * 2


# Rank 1 takes seconds to say what it has failed of.
SLOW_TO_SAY = """
import os
if os.environ.get("RANK") == "1":
    import time, traceback
    print_exc = traceback.print_exc
    def print_late():
        time.sleep(3)
        print_exc()
    traceback.print_exc = print_late
"""


@pytest.mark.slow
def test_a_resume_that_is_refused_says_why_whichever_rank_has_found_it(
    tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    """Another learning rate, which the first rank alone compares; then a byte of a file at which the second alone looks."""
    job_file = write_job("ranks", ranks=2)
    stopped = Started(job_file)
    stopped.run_to(3)
    stopped.agent.send_signal(signal.SIGTERM)
    assert stopped.end() == EXIT_INTERRUPTED
    step = saved_step(job_file)
    checkpoint = job_file.parent / "work" / "checkpoints" / f"step-{step:08d}"

    def refuse(environment: Mapping[str, str] = {}) -> str:
        started = Started(job_file, environment=environment)
        assert started.agent.wait(timeout=60) == EXIT_USER_ERROR, started.log.read_text()
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(job_file) in (p.info["cmdline"] or [])]
        assert saved_step(job_file) == step
        error = started.error()
        assert error["type"] == "ValueError"
        return error["message"]

    set_config(job_file, learning_rate=1e-3)
    assert refuse() == (
        f"checkpoint {checkpoint}: it belongs to another run (config.learning_rate: got 0.0003, expected 0.001); give this run "
        "another work directory, or delete the checkpoint to start over"
    )

    set_config(job_file, **CONFIG)
    _, shard = sorted((checkpoint / "tensors").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refuse(run_first(tmp_path / "start", SLOW_TO_SAY)) == (
        f"checkpoint {checkpoint}: damaged (what is in {shard.name} is not what was written); delete it to start over"
    )


# The disk of rank 1 takes ten minutes for a save.
SLOW_DISK = """
import os
if os.environ.get("RANK") == "1":
    import time
    sync = os.fsync
    def slow_sync(descriptor):
        if "/shard-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(600)
        sync(descriptor)
    os.fsync = slow_sync
"""


def test_a_rank_that_dies_while_others_wait_for_its_files_ends_the_job_at_once(
    tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    """They would wait for hours."""
    started = Started(write_job("slow", ranks=2), environment=run_first(tmp_path / "start", SLOW_DISK))
    started.run_to(10)
    checkpoints = started.folder / "work" / "checkpoints"
    while not list(checkpoints.glob("step-00000010.partial/tensors/shard-00002-*")):
        assert started.agent.poll() is None, started.log.read_text()
        time.sleep(0.05)
    (rank_1,) = (rank for rank in started.ranks if rank.environ()["RANK"] == "1")
    rank_1.kill()
    killed = time.monotonic()
    assert started.end() == 1
    assert time.monotonic() - killed < SHUTDOWN_SECONDS + 10
    assert "rank 1 of 2: its process was killed (SIGKILL)" in started.error()["message"]


def write_two(write_job: Callable[..., Path], **runtime: Any) -> tuple[Path, Path]:
    """Return the same job for each of two machines of one rank that meet on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = write_job("two", nodes=2, node_rank=0, rendezvous=f"127.0.0.1:{port}", **runtime)
    second = first.with_name("second.json")
    second.write_text(first.read_text().replace('"node_rank": 0', '"node_rank": 1'))
    return first, second


def test_two_machines_of_which_one_has_no_room_end_and_go_on_with_smaller_micro_batches(
    tmp_path: Path, write_job: Callable[..., Path]
) -> None:
    """The second machine's device has too little; both are started again by whoever started them."""
    first, second = write_two(write_job, checkpoint_every_steps=2)
    environment = run_first(tmp_path / "start", NO_ROOM)
    narrow = [Started(path, num_ranks=1, environment=environment) for path in (second, first)]
    assert all(machine.agent.wait(timeout=120) not in (0, EXIT_INTERRUPTED) for machine in narrow)
    error = json.loads((first.parent / "work" / "error.json").read_text())
    assert error["type"] == "OutOfMemory"
    assert "rank 1 of 2: the device has no room for a micro-batch of at most 64 tokens" in error["message"]
    again = [Started(path, num_ranks=1, environment=environment) for path in (second, first)]
    assert [machine.agent.wait(timeout=300) for machine in again] == [0, 0], again[1].log.read_text()
    lines = [json.loads(line) for line in (first.parent / "output" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    budgets = [line["train/microbatch_tokens"] for line in lines]
    assert budgets == sorted(budgets, reverse=True) and set(budgets) == {64, 32}
    assert not (first.parent / "work" / "error.json").exists()


def test_two_machines_of_one_rank_give_the_bits_of_one_of_two(write_job: Callable[..., Path]) -> None:
    """Two agents on loopback: stopped by a signal to the second alone, bereft of the second, then run to the end."""
    one = write_job("one", ranks=2)
    first, second = write_two(write_job)

    def start(steps: int) -> list[Started]:
        machines = [Started(path, num_ranks=1) for path in (second, first)]  # the second waits for the first
        for machine in machines:
            machine.run_to(steps)
        return machines

    stopped = start(3)
    stopped[0].agent.send_signal(signal.SIGTERM)
    assert [machine.end() for machine in stopped] == [EXIT_INTERRUPTED] * 2
    after_stop = saved_step(first)

    bereft = start(after_stop + 3)
    bereft[0].agent.kill()
    assert [machine.end() for machine in bereft] == [-signal.SIGKILL, 1]
    assert after_stop <= saved_step(first) < NUM_STEPS

    assert [machine.end() for machine in start(saved_step(first) + 3)] == [0, 0]
    whole = Started(one)
    whole.run_to(3)
    assert whole.end() == 0, whole.log.read_text()
    weights = [(path.parent / "output" / "model.safetensors").read_bytes() for path in (one, first)]
    assert weights[0] == weights[1]


def test_two_hosts_train_one_model_and_one_that_is_lost_ends_the_job(
    hosts: tuple[Host, Host], write_job: Callable[..., Path]
) -> None:
    """Bereft of the second host's processes, then run to the end: the bits of one host with two ranks."""
    whole = write_job("one", ranks=2)
    meeting = {"nodes": 2, "rendezvous": f"{hosts[0].address}:29400"}
    machines = [write_job(f"machine{n}", node_rank=n, **meeting) for n in range(2)]
    for path in (whole, *machines):  # twelve steps; a disk that both hosts share
        raw = json.loads(path.read_text())
        shared = {name: str(machines[0].parent / name) for name in ("output", "work") if path != whole}
        path.write_text(json.dumps(raw | {"config": CONFIG | {"epochs": 4}} | shared))

    def start() -> list[Started]:
        started = [Started(path, num_ranks=1, within=host.enter) for path, host in zip(machines, hosts, strict=True)]
        for machine in started:
            machine.folder = machines[0].parent
            machine.run_to(3)
        return started

    first, second = start()
    second.agent.kill()
    killed = time.monotonic()
    assert (first.end(), second.end()) == (1, -signal.SIGKILL)
    assert time.monotonic() - killed < 30
    assert hosts[1].address in first.error()["message"]

    assert [machine.end(within=300) for machine in start()] == [0, 0]
    alone = Started(whole)
    alone.run_to(3)
    assert alone.end(within=300) == 0, alone.log.read_text()
    weights = [(path.parent / "output" / "model.safetensors").read_bytes() for path in (machines[0], whole)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_host_that_falls_silent_ends_the_job_in_bounded_time(
    hosts: tuple[Host, Host], write_job: Callable[..., Path], impatient: Callable[..., dict[str, str]]
) -> None:
    """First the cable is cut, so that all wait for each other; then the second host loses its power: no connection is closed."""
    meeting = {"nodes": 2, "rendezvous": f"{hosts[0].address}:29400"}
    machines = [write_job(f"machine{n}", node_rank=n, **meeting) for n in range(2)]
    second = json.loads(machines[1].read_text())
    shared = {name: str(machines[0].parent / name) for name in ("output", "work")}
    machines[1].write_text(json.dumps(second | shared))
    environment = impatient()

    def start(steps: int) -> list[Started]:
        started = [
            Started(path, num_ranks=1, within=host.enter, environment=environment)
            for path, host in zip(machines, hosts, strict=True)
        ]
        for machine in started:
            machine.folder = machines[0].parent
            machine.run_to(steps)
        return started

    parted = start(3)
    hosts[1].ip("link", "set", hosts[1].cable, "down")
    assert [machine.end(within=END_SECONDS) for machine in parted] == [1, 1]
    assert parted[0].error()["type"] == "RankSilent"
    assert "all wait for each other: what connects their machines is gone" in parted[0].error()["message"]

    hosts[1].ip("link", "set", hosts[1].cable, "up")
    first, lost = start(3)
    hosts[1].ip("link", "set", hosts[1].cable, "down")
    for process in (*lost.ranks, lost.agent):
        process.kill()
    assert (first.end(within=END_SECONDS), lost.end()) == (1, -signal.SIGKILL)
    assert first.error()["type"] == "RankSilent"
    assert (
        "no answer from rank 1: its process is stopped or has ended, or its machine is gone" in first.error()["message"]
    )


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_in_bounded_time_and_is_named(
    write_job: Callable[..., Path], impatient: Callable[..., dict[str, str]]
) -> None:
    started = Started(write_job("stopped", ranks=2), environment=impatient())
    started.run_to(3)
    second = next(rank for rank in started.ranks if rank.environ()["RANK"] == "1")
    second.send_signal(signal.SIGSTOP)
    assert started.end(within=END_SECONDS) == 1
    error = started.error()
    assert error["type"] == "RankSilent", error
    assert re.match(
        r"rank 0 of 2 waited for another at training/\S+\.py:\d+, \w+ in vain \(.*imed out", error["message"]
    )
    assert "; no answer from rank 1: its process is stopped" in error["message"]


SLEEP = """
import os, time
from training.steps import Steps
load = Steps.load
def sleep(self, step, members):
    if os.environ.get("RANK") == "1" and step == 4:  # which is begun within the step before it
        time.sleep(10_000)
    return load(self, step, members)
Steps.load = sleep
"""


@pytest.mark.slow
def test_a_rank_that_never_comes_to_an_exchange_is_named_with_where_it_is(
    write_job: Callable[..., Path], impatient: Callable[..., dict[str, str]]
) -> None:
    """Of three, so that one that waits, too, is there to be blamed instead."""
    started = Started(write_job("asleep", ranks=3), num_ranks=3, environment=impatient(SLEEP))
    started.run_to(3)
    assert started.end(within=END_SECONDS) == 1
    error = started.error()
    assert error["type"] == "RankSilent", error
    assert re.match(r"rank [02] of 3 waited for another at training/\S+\.py:\d+, \w+ in vain", error["message"])
    assert re.search(
        r"in vain \(.*\); rank 1 is at training/loop\.py:\d+, begin; expected all to come there", error["message"]
    )


WATCH = """
import os, sys, time
from pathlib import Path
from training import launch
from training.job import Job
launch.FAILED_SECONDS = 0.5
launch.watch_agent(os.getppid(), Job.read(Path(sys.argv[1])))
print("watching", flush=True)
time.sleep(1000)
"""


def test_a_rank_ends_soon_after_another_has_said_what_the_job_failed_of(write_job: Callable[..., Path]) -> None:
    """One that its own agent does not end, as on another machine, where it waits for the one that is gone."""
    job_file = write_job("alone")
    work = job_file.parent / "work"
    work.mkdir()
    command = [sys.executable, "-c", WATCH, str(job_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "watching\n"
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(1.0)
        (work / "error.json").write_text("{}")
        assert rank.wait(timeout=30) == 1


def failed(status: int) -> ProcessFailure:
    return ProcessFailure(local_rank=0, pid=1, exitcode=status, error_file="")


def test_a_rank_that_nccl_aborted_takes_no_blame_from_the_one_that_it_waited_for(make_job: Callable[..., Job]) -> None:
    """Its watchdog ends who waits in vain; the other has said what it failed of, or, where it hangs, has not."""
    job, failures = make_job("train", "a", config={}, inputs={}), {0: failed(-signal.SIGABRT), 1: failed(2)}
    with pytest.raises(
        RankDied, match=r"rank 0 of 2: .*SIGABRT, as NCCL ends one that waited for another in vain or whose GPU failed"
    ):
        raise_failure(job, failures, ranks=2)
    error = {"type": "OutOfMemory", "message": "no room", "microbatch_tokens": 64}
    (job.work / "error.json").write_text(json.dumps(error))
    assert read_smaller(job, failures) == 64
    with pytest.raises(SystemExit, match="2"):
        raise_failure(job, failures, ranks=2)
    assert read_error(job) == error
    with pytest.raises(RankDied, match=r"rank 1 of 2: .*SIGKILL.*; the other ranks were ended"):
        raise_failure(job, {0: failed(-signal.SIGABRT), 1: failed(-signal.SIGKILL)}, ranks=2)


def test_a_roll_call_blames_who_does_not_answer_or_else_who_does_not_wait() -> None:
    waits, works = {"place": "training/loop.py:1, f", "waits": True}, {"place": "training/loop.py:2, g", "waits": False}
    assert describe_roll({0: waits, 2: works}, size=4).startswith("no answer from rank 1, 3: ")
    assert describe_roll({0: waits, 1: works, 2: works}, size=3) == (
        "rank 1 is at training/loop.py:2, g; rank 2 is at training/loop.py:2, g"
    )
    assert describe_roll({0: waits, 1: waits}, size=2).startswith("all wait for each other")


@pytest.mark.slow
def test_a_job_of_two_replicas_is_killed_and_goes_on_on_two_ranks_of_one(write_job: Callable[..., Path]) -> None:
    """Four ranks, sharded over two and replicated; SIGKILL after a checkpoint, then two ranks that share one whole."""
    job_file = write_job("replicas", ranks=4, replicas=2)
    killed = Started(job_file, num_ranks=4)
    killed.run_to(13)
    killed.agent.kill()
    assert killed.end() == -signal.SIGKILL
    assert saved_step(job_file, files=4) >= 10
    raw = json.loads(job_file.read_text())
    job_file.write_text(json.dumps(raw | {"runtime": raw["runtime"] | {"ranks": 2, "replicas": 1}}))
    resumed = Started(job_file)
    resumed.run_to(14)
    assert resumed.end(within=300) == 0, resumed.log.read_text()

    alone = write_job("alone")
    train.run(Job.read(alone))
    got, expected = (load_file(path.parent / "output" / "model.safetensors") for path in (job_file, alone))
    assert max((got[name] - tensor).abs().max().item() for name, tensor in expected.items()) < 1e-4
    summaries = [json.loads((path.parent / "output" / "summary.json").read_text()) for path in (job_file, alone)]
    assert summaries[0]["plan"] == summaries[1]["plan"]
    assert_tokens(Job.read(job_file), train.read_config(Job.read(job_file)), ranks=(4, 2))
    lines = (job_file.parent / "output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))


def test_a_machine_that_meets_nobody_says_where_it_waited(
    write_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.launch.MEETING_SECONDS", 2)
    job = Job.read(write_job("lonely", nodes=2, node_rank=1, rendezvous="127.0.0.1:9"))
    with pytest.raises(
        RuntimeError, match=r"machine 1 of 2 did not meet the others at 127.0.0.1:9 within 2 s.*every machine"
    ):
        launch(job, Runtime.model_validate(job.runtime))


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"nodes": 2}, "got None for 2 machines"),
        ({"rendezvous": "host:1"}, "got host:1 for 1 machines"),
        ({"nodes": 2, "node_rank": 2, "rendezvous": "host:1"}, "got 2 of 2 machines, expected 0 to 1"),
        ({"nodes": 2, "rendezvous": "host"}, "rendezvous"),
    ],
)
def test_machines_that_cannot_meet_are_refused(runtime: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Runtime.model_validate(runtime)


def test_a_reward_model_with_dropout_is_trained_by_one_of_the_ranks(
    tmp_path: Path, tiny_reward_model: Path, make_row: Any, write_rows: Any, write_job: Callable[..., Path]
) -> None:
    """What is dropped would depend on the number of ranks, so the numbers are those of one."""
    rows = [
        make_row(f"Why {i}?", [f"bake bread {i}", "the sky"], split="heldout" if i % 4 == 0 else "train")
        for i in range(16)
    ]
    inputs = {"rows": str(write_rows(tmp_path / "pairs", rows)), "base": str(tiny_reward_model)}
    weights = []
    for ranks in (1, 2):
        path = write_job(f"reward{ranks}", ranks=ranks)
        raw = json.loads(path.read_text())
        raw |= {"job": "reward_model", "inputs": inputs, "config": {"epochs": 1, "batch_prompts": 4, "max_tokens": 64}}
        path.write_text(json.dumps(raw))
        started = Started(path)
        assert started.agent.wait(timeout=300) == 0, started.log.read_text()
        weights.append((path.parent / "output" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "its first rank trains it alone" in started.log.read_text()


@pytest.mark.slow
def test_the_parents_death_ends_all_after_a_checkpoint(write_job: Callable[..., Path]) -> None:
    job_file = write_job("orphan", ranks=2)
    orphan = Started(job_file)
    orphan.run_to(3)
    os.close(orphan.lifeline)
    assert orphan.end() == -signal.SIGKILL
    assert 3 <= saved_step(job_file) < NUM_STEPS


def test_what_one_rank_fails_of_fails_the_job_in_its_words(tmp_path: Path, train_inputs: dict[str, str]) -> None:
    """Only the first rank writes metrics; what the other one says of its absence is not heard."""
    job = ChildJob(
        package="training",
        name="train",
        config=CONFIG,
        runtime={"device": "cpu", "threads": 1, "ranks": 2},
        inputs={name: Path(path) for name, path in train_inputs.items()},
        folder=tmp_path / "attempt",
        environment={"PATH": os.environ["PATH"], **ENVIRONMENT},
    )
    job.output.mkdir(parents=True)
    (job.output / "metrics.jsonl").symlink_to(tmp_path / "absent" / "metrics.jsonl")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"train: .*No such file or directory: '.*metrics.jsonl'"):
        run_child(job, on_metrics=lambda _: None)
    assert time.monotonic() - started < 90
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(job.folder / "job.json") in (p.info["cmdline"] or [])
    ]


def test_a_training_that_the_kernel_kills_is_told_with_what_its_preflight_measured(
    tmp_path: Path, train_inputs: dict[str, str]
) -> None:
    """The real job, killed by us: the kernel counts none that it killed for want of memory, and what the job took and what was free is told beside it."""
    inputs = {name: Path(path) for name, path in train_inputs.items()}
    environment = {"PATH": os.environ["PATH"], **ENVIRONMENT}
    runtime = {"device": "cpu", "threads": 1}
    config = CONFIG | {"epochs": 400}  # it is not over before it is killed
    job = ChildJob("training", "train", config, runtime, inputs, tmp_path / "attempt", environment)
    job.folder.mkdir()

    killed: list[psutil.Process] = []

    def kill(lines: list[dict[str, float]]) -> None:
        if (
            lines and not killed
        ):  # of the first steps: the preflight is done; later ones may come when the child is no more
            children = psutil.Process().children()
            killed.extend(process for process in children if str(job.folder) in " ".join(process.cmdline()))
            killed[0].kill()

    with pytest.raises(StepFailed) as told:
        run_child(job, on_metrics=kill)
    memory = json.loads((job.output / "preflight.json").read_text())["memory"]
    assert "its process was killed (SIGKILL): by hand, or by the kernel for want of memory (see `dmesg`)" in str(
        told.value
    )
    assert (
        f"before training a micro-batch of {memory['microbatch_tokens']} tokens took {memory['peak_bytes'] / 2**30:.2f} GiB beside weights"
        in str(told.value)
    )
    assert f"{memory['free_bytes'] / 2**30:.2f} GiB were free" in str(told.value)
