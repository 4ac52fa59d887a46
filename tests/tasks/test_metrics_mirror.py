"""A child's metrics on a real MLflow: every figure of every step, also where the server was away when they came."""

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from infra.settings import MLFLOW_PATIENCE, Settings
from infra.store import open_store
from infra.tracking import Tracking
from tasks import mirror
from tasks.mirror import MetricsMirror

LINES = [
    {"time": 1.7e9 + step, "step": step, "total": 3, "train/loss": 2.0 / step, "train/ess": 0.5 + step / 10}
    for step in (1, 2, 3)
]
HISTORY = "api/2.0/mlflow/metrics/get-history"


def read_history(settings: Settings, run_id: str, name: str) -> list[tuple[int, float, int]]:
    page = f"{settings.mlflow_tracking_uri}/{HISTORY}?run_id={run_id}&metric_key={name}"
    found = json.loads(urllib.request.urlopen(page, timeout=60).read())
    return sorted((int(p["step"]), float(p["value"]), int(p["timestamp"])) for p in found.get("metrics", []))


def expected(name: str) -> list[tuple[int, float, int]]:
    return [(int(line["step"]), line[name], int(line["time"] * 1000)) for line in LINES]


@contextmanager
def forward(port: int, target: int) -> Iterator[None]:
    """Let a port of loopback lead to another one."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                ours, _ = listener.accept()
            except OSError:
                return
            theirs = socket.create_connection(("127.0.0.1", target))
            for pair in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield


@pytest.fixture
def run_id(stack: Settings) -> Iterator[str]:
    store, tracking = open_store(stack), Tracking(stack.mlflow_tracking_uri)
    location = store.url("mlflow/test_metrics")
    run = tracking.start_run(tracking.ensure_experiment("test_metrics", artifact_location=location), name="t", tags={})
    yield run.id
    tracking.finish(run.id, status="FINISHED")


def test_every_figure_of_every_step_arrives_and_none_twice(stack: Settings, run_id: str) -> None:
    hears = MetricsMirror(Tracking(stack.mlflow_tracking_uri), run=run_id, title="training")
    for line in LINES:
        hears([line])  # too soon to be sent one by one
    hears.close()
    hears.close()
    for name in ("train/loss", "train/ess"):
        assert read_history(stack, run_id, name) == expected(name)
    assert read_history(stack, run_id, "total") == []


def test_what_came_while_mlflow_was_away_arrives_later(
    stack: Settings, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SHIP_SECONDS", 0.0)
    for name in MLFLOW_PATIENCE:  # as every process of ours has it
        monkeypatch.setenv(name, stack.library_environment()[name])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hears = MetricsMirror(Tracking(f"http://127.0.0.1:{port}"), run=run_id, title="training")
    asked = time.monotonic()
    hears(LINES[:2])  # nobody listens
    assert time.monotonic() - asked < 60  # MLflow's own patience is minutes, in which a run would stand still
    assert read_history(stack, run_id, "train/loss") == []
    behind = urlsplit(stack.mlflow_tracking_uri).port
    assert behind is not None
    with forward(port, behind):
        hears(LINES[2:])
        hears.close()
    for name in ("train/loss", "train/ess"):
        assert read_history(stack, run_id, name) == expected(name)
