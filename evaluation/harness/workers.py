"""A policy in several processes, each with the whole model on a device of its own, that share out the calls of one plan.

The plan is made once, in the process that started them, and a batch is answered as it would be there: the scores are those of one
process. A call goes to whichever worker is free, so that long answers of one do not hold up the others; each keeps the prefix
that it read last, and calls come in the order of their prefixes.

A worker ends with its parent, and the parent hears of a worker's end at once (`concurrent.futures`). Only the parent writes
answers, so any number of workers goes on from what another number left.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluation.harness.calls import Call, Engine, run_pooled
from evaluation.harness.engine import TransformersEngine, load_model
from evaluation.harness.offline import closed_sockets
from training.config import Device, Precision
from training.job import Interrupted, describe_exit, end_group
from training.model import resolve_device


class WorkerDied(RuntimeError):  # noqa: N818 - what the user reads
    """A worker process was ended from outside."""


@dataclass(frozen=True)
class Copies:
    """What every worker makes its copy of, and how many there are."""

    folder: Path
    tokenizer: Any
    precision: Precision
    device: Device
    batch_size: int
    workers: int
    threads: int  # of all workers together


class WorkerPool(Engine):
    """Copies of a policy in as many processes; on GPUs each has its own, CPU threads are divided among them."""

    def __init__(self, copies: Copies, *, stop: threading.Event) -> None:
        check_devices(copies)
        self.batch_size = copies.batch_size
        self._stop = stop
        context = multiprocessing.get_context("spawn")
        self._stopped, numbers = context.Event(), context.SimpleQueue()
        for number in range(copies.workers):
            numbers.put(number)
        others = multiprocessing.active_children()
        self._pool = ProcessPoolExecutor(
            copies.workers, mp_context=context, initializer=start_worker, initargs=(copies, numbers, self._stopped)
        )
        loaded = run_pooled(self._pool, describe_worker, range(copies.workers), stop=stop)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]
        try:
            for _, shares in loaded:
                self.shares_reading, self.shares_writing = shares
        except BrokenProcessPool as error:
            raise self._explain() from error
        except BaseException:
            self.close()
            raise

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Sequence[Any]]]:
        """Yield (number, answers) of calls as they are done. WorkerDied when a worker is gone."""
        try:
            yield from run_pooled(self._pool, answer_call, calls, stop=self._stop)
        except BrokenProcessPool as error:
            raise self._explain() from error

    def close(self) -> None:
        """End the workers, each after the forward pass that it is at."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _explain(self) -> Exception:
        """Return what ended the pool: the stop request, or the first worker that was killed; the others are ended for it.

        They are killed: a worker that was killed while it handed an answer over holds the queue's lock for ever, and the others would
        wait for that, since they leave SIGTERM to their parent.
        """
        statuses = [process.exitcode for process in self._processes if process.exitcode]
        for process in self._processes:
            process.kill()
        self._pool.shutdown()
        if self._stop.is_set():
            return Interrupted("benchmark")
        status = statuses[0] if statuses else -signal.SIGKILL
        return WorkerDied(
            f"of {len(self._processes)} worker processes one is gone, and the others were ended: {describe_exit(status)}; run the same "
            "command again to go on from the answers so far, with a lower runtime.workers if it was memory"
        )


def check_devices(copies: Copies) -> None:
    """Raise ValueError when there are fewer GPUs than workers that each want one."""
    there = torch.cuda.device_count()
    if resolve_device(copies.device).type == "cuda" and copies.workers > there:
        raise ValueError(
            f"runtime.workers: got {copies.workers}, but torch sees {there} GPUs here; expected a GPU for each worker; set it, and "
            f"noise.workers, to {there} or less"
        )


@dataclass
class Worker:
    """What a worker process holds."""

    copies: Copies
    number: int
    stopped: Any  # an event of the parent's

    @cached_property
    def engine(self) -> TransformersEngine:
        """The copy of the model, loaded with the first call, whose failure is told as any other's."""
        device = resolve_device(self.copies.device)
        if device.type == "cuda":
            device = torch.device("cuda", self.number)
        torch.set_num_threads(max(1, self.copies.threads // self.copies.workers))
        model = load_model(self.copies.folder, precision=self.copies.precision, device=device)
        engine = TransformersEngine(model, self.copies.tokenizer, batch_size=self.copies.batch_size)
        model.register_forward_pre_hook(self.heed_stop)
        return engine

    def heed_stop(self, *_: Any) -> None:
        """Raise Interrupted when the parent has ended its work: a forward pre-hook."""
        if self.stopped.is_set():
            raise Interrupted("benchmark")


worker: Worker  # of a worker process
offline = ExitStack()  # for as long as it lives


def start_worker(copies: Copies, numbers: Any, stopped: Any) -> None:
    """Make this process a worker: one that leaves signals to its parent, ends with it, and opens no connection."""
    global worker
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="parent's life", daemon=True).start()
    offline.enter_context(closed_sockets())
    worker = Worker(copies, numbers.get(), stopped)


def end_with_parent() -> None:
    """End this process as soon as its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, f"process {os.getpid()} is no worker"
    parent.join()
    end_group()


def describe_worker(_: int) -> tuple[bool, bool]:
    """Load the model and return where its prefixes are read once."""
    return worker.engine.shares_reading, worker.engine.shares_writing


def answer_call(call: Call) -> list[Any]:
    """Answer a call with this worker's model."""
    return worker.engine.answer(call)
