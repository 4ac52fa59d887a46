"""Several processes give the numbers of one; a killed worker, a dead parent and a stop request end them all."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from evaluation.config import BenchmarkConfig, VariedConfig
from evaluation.harness.benchmark import run as run_job
from evaluation.harness.workers import WorkerDied
from tests.evaluation.evaluated import GSM8K, MMLU, read_answers, read_lines, run
from training.config import Device, Runtime
from training.job import Interrupted, Job

ONE = Runtime(device=Device.cpu, threads=1, microbatch_tokens=512)  # batches of two
TWO = ONE.model_copy(update={"workers": 2, "threads": 2})
SINGLE = TWO.model_copy(update={"microbatch_tokens": 1})  # as many calls as questions
FIVE_SHOT = MMLU.model_copy(update={"num_fewshot": 2})
LONG = GSM8K.model_copy(update={"max_gen_toks": 400})  # a call takes far longer than the parent's look for what is done
START_SECONDS, END_SECONDS = 600.0, 30.0  # until a child computes on a busy machine; until what ends has ended


@pytest.mark.parametrize("config", [FIVE_SHOT, GSM8K], ids=["choices", "generation"])
def test_two_workers_give_the_numbers_of_one_process(
    tiny_policy: Path, mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    one = run(tiny_policy, mirror, config, folder=tmp_path / "one", runtime=ONE)
    two = run(tiny_policy, mirror, config, folder=tmp_path / "two", runtime=TWO)
    assert one == two, "log-probabilities, texts and the profile, to the last digit"
    assert len(one.answers) == (6 if config is GSM8K else 40)
    assert multiprocessing.active_children() == [], "no worker is left"


class CountWorkers(threading.Event):
    """A stop request that never comes; looked at, it counts the processes that work."""

    most = 0

    def is_set(self) -> bool:
        self.most = max(self.most, len(multiprocessing.active_children()))
        return False


def test_a_run_that_varies_workers_has_as_many_and_the_numbers_of_one(
    tiny_policy: Path, mirror: Path, tmp_path: Path
) -> None:
    one = run(tiny_policy, mirror, GSM8K, folder=tmp_path / "one", runtime=ONE)
    varied = VariedConfig.model_validate(GSM8K.model_dump() | {"workers": 2})
    folders = {"output": tmp_path / "two" / "output", "work": tmp_path / "two" / "work"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    job = Job(
        name="benchmark",
        config=varied.model_dump(mode="json"),
        runtime=ONE.model_dump(mode="json"),
        inputs={"model": tiny_policy, "mirror": mirror},
        stop=(stop := CountWorkers()),
        **folders,
    )
    run_job(job)
    assert stop.most == 2
    assert read_lines(folders["output"] / "samples.jsonl") == one.samples
    assert json.loads((folders["output"] / "profile.json").read_text()) == one.profile


class KillOne(threading.Event):
    """A stop request that never comes; looked at, it kills a worker once there are some answers."""

    def __init__(self, folder: Path, *, freeze: bool) -> None:
        super().__init__()
        self.folder, self.freeze = folder, freeze
        self.killed = 0.0  # when, in seconds of the monotonic clock

    def is_set(self) -> bool:
        if not self.killed and len(read_answers(self.folder)) >= 2:
            self.killed = time.monotonic()
            one, other = multiprocessing.active_children()
            if self.freeze:
                os.kill(other.pid or 0, signal.SIGSTOP)
            os.kill(one.pid or 0, signal.SIGKILL)
        return False


@pytest.mark.parametrize("freeze", [False, True], ids=["other_works", "other_waits_for_ever"])
def test_a_killed_worker_is_told_and_another_number_of_workers_goes_on(
    tiny_policy: Path, mirror: Path, tmp_path: Path, freeze: bool
) -> None:
    whole = run(tiny_policy, mirror, LONG, folder=tmp_path / "whole", runtime=ONE)
    stop = KillOne(tmp_path / "cut", freeze=freeze)
    with pytest.raises(WorkerDied, match=r"of 2 worker processes one is gone.* killed \(SIGKILL\).* to go on from"):
        run(tiny_policy, mirror, LONG, folder=tmp_path / "cut", runtime=SINGLE, stop=stop)
    assert time.monotonic() - stop.killed < END_SECONDS
    assert multiprocessing.active_children() == []
    kept = read_answers(tmp_path / "cut")
    assert 2 <= len(kept) < 6
    rest = run(tiny_policy, mirror, LONG, folder=tmp_path / "cut", runtime=ONE)
    assert rest == whole
    assert read_answers(tmp_path / "cut")[: len(kept)] == kept, "nothing is answered twice"


class StopAtAnswers(threading.Event):
    """A stop request that comes once there are so many answers."""

    def __init__(self, folder: Path, *, answers: int) -> None:
        super().__init__()
        self.folder, self.answers = folder, answers

    def is_set(self) -> bool:
        return len(read_answers(self.folder)) >= self.answers


def test_stopped_workers_end_and_two_go_on_from_what_one_process_left(
    tiny_policy: Path, mirror: Path, tmp_path: Path
) -> None:
    whole = run(tiny_policy, mirror, LONG, folder=tmp_path / "whole", runtime=ONE)
    for runtime, answers in ((ONE, 1), (SINGLE, 3)):
        stop = StopAtAnswers(tmp_path / "cut", answers=answers)
        with pytest.raises(Interrupted):
            run(tiny_policy, mirror, LONG, folder=tmp_path / "cut", runtime=runtime, stop=stop)
        assert answers <= len(read_answers(tmp_path / "cut")) < 6
        assert multiprocessing.active_children() == []
    rest = run(tiny_policy, mirror, LONG, folder=tmp_path / "cut", runtime=TWO)
    assert rest.samples == whole.samples and rest.rows == whole.rows


def test_workers_end_with_their_parent(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    job = {
        "job": "benchmark",
        "config": LONG.model_dump(mode="json"),
        "runtime": TWO.model_dump(mode="json"),
        "inputs": {"model": str(tiny_policy), "mirror": str(mirror)},
        "output": str(tmp_path / "output"),
        "work": str(tmp_path / "work"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.defpath}
    command = [sys.executable, "-m", "evaluation", str(tmp_path / "job.json")]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + START_SECONDS
    while not read_answers(tmp_path):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 2
    child.kill()
    child.wait()
    _, alive = psutil.wait_procs(workers, timeout=END_SECONDS)
    assert alive == []
