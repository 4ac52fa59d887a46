"""Starts, deaths and stops of a whole stack of its own: minutes, since each start is a real one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.settings import Settings
from infra.stack import SERVICES, StackError, down, status, up
from infra.stack.http import ask
from infra.stack.processes import find_processes
from tests.stack_fixture import make_settings

pytestmark = pytest.mark.slow

WITHOUT_MLFLOW = ("s3", "prefect", "worker")
UP = """
import sys
from infra.settings import read_settings
from infra.stack import up
done = up(read_settings(home=sys.argv[1], s3_port=sys.argv[2], prefect_port=sys.argv[3]), services=("s3",))
print(",".join(done.started))
"""
FLOW = '''
import subprocess, sys
from pathlib import Path
from prefect import flow
from infra.settings import child_environment

CHILD = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    time.sleep(1)
    Path(sys.argv[1] + ".checkpoint").write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1] + ".pid").write_text(str(os.getpid()))
time.sleep(600)
"""

@flow(name="hold")
def hold(folder: str) -> None:
    """Start a child that the flow forwards the end to, and one that it forgets; both in sessions of their own."""
    def start(name):
        words = [sys.executable, "-c", CHILD, str(Path(folder) / name)]
        return subprocess.Popen(words, env=child_environment({}), start_new_session=True)
    forgotten, minded = start("forgotten"), start("minded")
    try:
        minded.wait()
    except BaseException:
        minded.terminate()
        minded.wait()
        raise
'''


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    made = make_settings(tmp_path / "home of a stack")
    try:
        yield made
    finally:
        down(made)
        assert find_processes(made.home) == []


def start_run(settings: Settings, folder: Path) -> str:
    """Deploy the flow `hold` and start it on the stack's worker. Returns the run's id."""
    (folder / "hold.py").write_text(FLOW)
    api = settings.prefect_api_url
    flow = ask(f"{api}/flows/", {"name": "hold"})
    deployment: dict[str, Any] = {
        "name": "hold",
        "flow_id": flow["id"],
        "work_pool_name": settings.work_pool,
        "path": str(folder),
        "entrypoint": "hold.py:hold",
        "parameters": {"folder": str(folder)},
        "enforce_parameter_schema": False,
    }
    made = ask(f"{api}/deployments/", deployment)
    run = ask(f"{api}/deployments/{made['id']}/create_flow_run", {"name": "held", "state": {"type": "SCHEDULED"}})
    return str(run["id"])


def start_run_without_worker(settings: Settings) -> str:
    """Make a run such as a flow called in a terminal has, whose process died. Returns its id."""
    flow = ask(f"{settings.prefect_api_url}/flows/", {"name": "hold"})
    run = {"flow_id": flow["id"], "name": "unminded", "state": {"type": "RUNNING"}}
    return str(ask(f"{settings.prefect_api_url}/flow_runs/", run)["id"])


def lives(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits for init to take note does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_files(*paths: Path) -> None:
    deadline = time.monotonic() + 90
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, [path for path in paths if not path.exists()]
        time.sleep(0.2)


def test_down_cancels_the_runs_lets_children_save_and_leaves_no_process(settings: Settings, tmp_path: Path) -> None:
    up(settings, services=WITHOUT_MLFLOW)
    run = start_run(settings, tmp_path)
    await_files(tmp_path / "minded.pid", tmp_path / "forgotten.pid")
    unminded = start_run_without_worker(settings)
    pids = [int((tmp_path / f"{name}.pid").read_text()) for name in ("minded", "forgotten")]
    report = down(settings)
    assert sorted(report.cancelled) == ["held", "unminded"]
    assert report.stopped == WITHOUT_MLFLOW
    assert [int(line.split()[0]) for line in report.ended] == [pids[1]]
    assert not any(map(lives, pids))
    assert (tmp_path / "minded.checkpoint").exists() and (tmp_path / "forgotten.checkpoint").exists()
    assert find_processes(settings.home) == []
    assert down(settings).stopped == ()

    up(settings, services=("prefect",))
    for each in (run, unminded):
        assert ask(f"{settings.prefect_api_url}/flow_runs/{each}")["state_type"] == "CANCELLED"


def test_up_after_supervisord_was_killed_ends_the_orphans_and_keeps_the_data(settings: Settings) -> None:
    first = up(settings, services=("s3", "prefect"))
    variable = {"name": "kept", "value": "data"}
    ask(f"{settings.prefect_api_url}/variables/", variable)
    orphans = {service.pid for service in first.services}
    next(p for p in find_processes(settings.home) if "supervisor.supervisord" in p.cmdline()).kill()
    assert [service.state for service in status(settings).services[:2]] == ["orphaned", "orphaned"]
    second = up(settings, services=("s3", "prefect"))
    assert second.healthy and second.started == ("s3", "prefect")
    assert not any(lives(pid) for pid in orphans if pid)
    assert ask(f"{settings.prefect_api_url}/variables/name/kept")["value"] == "data"
    assert second.settings == first.settings


def test_down_of_a_half_dead_stack_leaves_nothing(settings: Settings) -> None:
    up(settings, services=("s3",))
    next(p for p in find_processes(settings.home) if "supervisor.supervisord" in p.cmdline()).kill()
    (settings.home / "supervisord.pid").write_text(str(psutil.Process().pid))
    report = down(settings)
    assert [line.split()[1].endswith("weed") for line in report.ended] == [True]
    assert find_processes(settings.home) == []


def test_two_ups_at_once_start_one_stack(settings: Settings) -> None:
    words = [sys.executable, "-c", UP, str(settings.home), str(settings.s3_port), str(settings.prefect_port)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said == ["", "s3"]
    assert len([p for p in find_processes(settings.home) if "supervisor.supervisord" in p.cmdline()]) == 1


def test_up_adds_what_is_missing_to_a_running_stack(settings: Settings) -> None:
    ready: list[Settings] = []
    first = up(settings, services=("s3",))
    second = up(settings, services=("s3", "mlflow"), on_ready=ready.append)
    assert second.started == ("mlflow",) and ready == [second.settings]
    assert second.services[0].pid == first.services[0].pid


def test_a_service_that_cannot_start_is_one_message_with_its_log_and_leaves_nothing(settings: Settings) -> None:
    (settings.home / "s3").mkdir(parents=True)
    (settings.home / "s3" / "filerldb2").write_text("not a database")
    with pytest.raises(StackError) as error:
        up(settings, services=("s3",))
    assert "S3 (SeaweedFS) did not start" in str(error.value)
    assert "filerldb2 Writable: Not a valid folder" in str(error.value)
    assert find_processes(settings.home) == []
    assert not (settings.home / "stack.json").exists()


def test_an_interrupted_up_leaves_nothing(settings: Settings) -> None:
    def interrupt(message: str) -> None:
        if "S3" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up(settings, services=SERVICES, progress=interrupt)
    assert find_processes(settings.home) == []
