"""What people see of a run on its way to them: the screen at once, MLflow in batches, Prefect's log rarely."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Protocol

from prefect.logging import get_run_logger

from infra.tracking import Tracking, TrackingError

BESIDE_NICE = 19
SHIP_SECONDS = 10.0
FINAL_SHIP_SECONDS = 60.0
LOG_SECONDS = 30.0


class Listener(Protocol):
    """Hears how a run goes on; the command line draws its bars with it."""

    def started(self, title: str) -> None:
        """Say that a step is being brought to its artifact."""

    def progressed(self, title: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Say how far its child is, with its newest metrics."""

    def finished(self, title: str, *, cached: bool, seconds: float) -> None:
        """Say that its artifact is there."""


listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Notes:
    """Tells MLflow what happened, in order, on a thread of its own: no step waits for it.

    MLflow is a mirror: what it does not take is named at the end, and costs nothing else.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="notes", initializer=give_way)
        self._told: list[tuple[str, Future[Any]]] = []

    def tell(self, what: str, request: Callable[[], Any]) -> None:
        """Make a request of MLflow after all that were asked for before; `what` names it in a warning."""
        self._told.append((what, self._thread.submit(request)))

    def close(self) -> None:
        """Wait for the last request, and warn of those that failed."""
        self._thread.shutdown()
        for what, note in self._told:
            try:
                note.result()
            except TrackingError as error:
                get_run_logger().warning("MLflow shows less than was done: %s: %s", what, error)


def give_way() -> None:
    """Lower the priority of this thread and of those that it starts: what it does goes on beside a child that computes."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's, and its children's
        os.nice(BESIDE_NICE)


class MetricsMirror:
    """Hears a child's metrics and passes them on: to the screen at once, to MLflow in batches, to Prefect's log rarely.

    MLflow may be slow or away: nothing is lost, since the file has it all and goes into the artifact; the points wait.
    """

    def __init__(self, tracking: Tracking, *, run: str, title: str) -> None:
        self._tracking, self._run, self._title = tracking, run, title
        self._waiting: list[tuple[str, float, int, int]] = []
        self._next_ship = time.monotonic() + SHIP_SECONDS
        self._pause = SHIP_SECONDS
        self._next_log = time.monotonic() + LOG_SECONDS

    def __call__(self, lines: list[dict[str, float]]) -> None:
        for line in lines:
            at, step = int(line["time"] * 1000), int(line["step"])
            self._waiting += [(name, value, at, step) for name, value in line.items() if "/" in name]
        if lines:
            self._show(lines[-1])
        if time.monotonic() >= self._next_ship:
            self.deliver()

    def close(self) -> None:
        """Deliver what waits, within a bounded time."""
        deadline = time.monotonic() + FINAL_SHIP_SECONDS
        while not self.deliver() and time.monotonic() < deadline:
            time.sleep(1.0)
        if self._waiting:
            get_run_logger().warning(
                "MLflow did not take %d metric points of %s; the artifact's metrics.jsonl has them all",
                len(self._waiting), self._title,
            )  # fmt: skip

    def deliver(self) -> bool:
        """Send what waits, and say whether MLflow took it."""
        if not self._waiting:
            return True
        try:
            self._tracking.log(self._run, metrics=self._waiting)
        except TrackingError:
            self._pause = min(2 * self._pause, 60.0)
            self._next_ship = time.monotonic() + self._pause
            return False
        self._waiting = []
        self._pause = SHIP_SECONDS
        self._next_ship = time.monotonic() + self._pause
        return True

    def _show(self, line: Mapping[str, float]) -> None:
        done, total = int(line["step"]), int(line["total"])
        metrics = {name: value for name, value in line.items() if "/" in name}
        if hear := listener.get():
            hear.progressed(self._title, done, total, metrics)
        if time.monotonic() >= self._next_log:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
            get_run_logger().info("%s: %d of %d %s", self._title, done, total, figures)
            self._next_log = time.monotonic() + LOG_SECONDS
