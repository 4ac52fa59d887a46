"""SIGKILL at every call that opens, makes, renames or deletes something of a checkpoint; then the run goes on, to the same bits."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.test_loop import Line, settings
from training.config import Runtime
from training.job import Interrupted, Job
from training.loop import run_steps

CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
NUM_STEPS = 5
INTERRUPTED = 75


def attempt(folder: Path, kill_at: int, stopped: bool) -> None:
    """Train a line through dropout with a checkpoint every second step; die at a call, of those that concern checkpoints."""
    torch.set_num_threads(1)
    calls = 0

    def heed(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        within = str(arguments[0]).startswith(str(folder / "work")) or event in {"os.remove", "os.rmdir"}
        if event in CALLS and within:  # what rmtree deletes has its bare name
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    for name in ("output", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    job = Job(name="train", config={}, runtime={}, inputs={}, output=folder / "output", work=folder / "work")
    if stopped:
        job.stop.set()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    sys.addaudithook(heed)
    runtime = Runtime(checkpoint_every_steps=2)
    try:
        run_steps(model, Line(NUM_STEPS), settings(), job=job, runtime=runtime, identity={})
    except Interrupted:
        sys.exit(INTERRUPTED)
    kill_at = 0  # that is no part of a checkpoint
    save_file(model.state_dict(), folder / "model.safetensors")


def run(folder: Path, *, kill_at: int = 0, stopped: bool = False) -> int:
    """Return the exit status of an attempt in a process of its own, forked from one that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=attempt, args=(folder, kill_at, stopped))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def find_steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in (folder / "work" / "checkpoints").glob("step-*[0-9]")]


def read_losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


def test_a_kill_at_any_call_of_a_save_costs_no_more_than_the_steps_since_the_last(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(whole) == 0
    expected, reached = load_file(whole / "model.safetensors"), 0
    kill_at = 0
    while True:
        kill_at += 1
        folder = tmp_path / str(kill_at)
        status = run(folder, kill_at=kill_at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        newest = max(find_steps(folder), default=0)
        assert newest >= reached, f"call {kill_at} has no step {reached} to go on from, which call {kill_at - 1} had"
        reached = newest
        assert run(folder) == 0, f"no going on after call {kill_at}"
        assert load_file(folder / "model.safetensors")["0.weight"].equal(expected["0.weight"]), kill_at
        assert read_losses(folder) == read_losses(whole), kill_at
        assert max(find_steps(folder)) == 4
    assert reached == 4 and kill_at > 30


def test_a_run_that_is_stopped_at_once_keeps_what_it_went_on_from(tmp_path: Path) -> None:
    """Killed at any call while it ends: nothing was done since, and the checkpoint is the only one."""
    assert run(tmp_path) == 0
    kill_at, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        kill_at += 1
        status = run(tmp_path, kill_at=kill_at, stopped=True)
        assert find_steps(tmp_path) == [4], f"killed at call {kill_at}"
    assert status == INTERRUPTED
    before = load_file(tmp_path / "model.safetensors")
    assert run(tmp_path) == 0
    assert load_file(tmp_path / "model.safetensors")["0.weight"].equal(before["0.weight"])
