"""Measurements in processes of their own, alone or taking their steps in turn."""

import collections
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from training.job import describe_exit

PROGRESS = "benchmark: "  # what a child's line of progress on stderr begins with
TURN = "benchmark waits for its turn\n"  # the line of a child that does


class MeasurementFailed(SystemExit):
    """A child failed; the message is the end of its error output. Nobody who does not expect it goes on."""


class Child:
    """A measurement in a process that begins on entry and is gone on exit; `say` gets its lines of progress."""

    def __init__(self, name: str, spec: dict[str, Any], say: Callable[[str], None]) -> None:
        self.name, self._spec, self._say = name, spec, say
        self._last = collections.deque[str](maxlen=60)
        self._steps = 0

    def __enter__(self) -> "Child":
        self._say(self.name)
        command = [sys.executable, "-m", "benchmarks.training", "--child", json.dumps(self._spec)]
        self._out = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self._out, stderr=subprocess.PIPE, text=True)  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._out:
            self._process.kill()

    def waits(self) -> bool:
        """Return, once it waits for its turn or has ended, whether it waits. MeasurementFailed where it failed."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.endswith(TURN):
                return True
            self._last.append(line)
            if line.startswith(PROGRESS):
                self._say(f"{self.name}: {line.removeprefix(PROGRESS).rstrip()}")
        if status := self._process.wait():
            told = describe_exit(status)
            raise MeasurementFailed(f"benchmarks.training: {self.name} failed: {told}\n{''.join(self._last)[-3000:]}")
        return False

    def take_step(self) -> bool:
        """Let it take its turn, and return whether it waits for another."""
        self._steps += 1
        self._say(f"{self.name}: step {self._steps} of {self._spec['warming_steps'] + self._spec['steps']}")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited, which `waits` tells
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.waits()

    def result(self) -> dict[str, Any]:
        """Return what it measured: its last line."""
        self._out.seek(0)
        found: dict[str, Any] = json.loads(self._out.read().splitlines()[-1])
        return found


def run_in_turn(children: list[Child]) -> list[dict[str, Any]]:
    """Begin children one after the other, let them take a step each in turn until all have ended, and return what they measured."""
    with contextlib.ExitStack() as stack:
        waiting = [child for child in children if stack.enter_context(child).waits()]
        while waiting:
            waiting = [child for child in waiting if child.take_step()]
        return [child.result() for child in children]


# --- in the child ---


def await_turn(spec: dict[str, Any]) -> None:
    """Where the measurement is one of several that take their steps in turn: wait until the others have taken theirs."""
    if "in_turn" in spec:
        print(TURN, end="", file=sys.stderr, flush=True)
        sys.stdin.readline()


def say(text: str) -> None:
    """Tell whoever waits."""
    print(PROGRESS + text, file=sys.stderr, flush=True)
