"""The whole stack, real: what is up stays up, what dies comes back, MLflow shows what lies in S3."""

import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from infra.settings import Service, Settings, read_settings
from infra.stack import ServiceStatus, status, up
from infra.stack.http import ask
from infra.stack.processes import find_processes
from infra.store import Store
from tests.stack_fixture import make_settings


def look_at(settings: Settings, service: Service) -> ServiceStatus:
    return next(found for found in status(settings).services if found.service == service)


def open_store(settings: Settings) -> Store:
    assert settings.s3_secret_key is not None
    return Store(
        bucket=settings.s3_bucket,
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
    )


def kill_and_await(settings: Settings, service: Service) -> None:
    """Kill a service's process with -9, and wait until a new one does its work and no child of the old one is left."""
    old = psutil.Process(look_at(settings, service).pid)
    family = [old, *old.children(recursive=True)]
    old.kill()
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        found = look_at(settings, service)
        if found.healthy and found.pid != old.pid and not any(process.is_running() for process in family):
            return
        time.sleep(0.3)
    raise AssertionError(f"{service} did not come back: {look_at(settings, service)}")


def test_all_four_services_are_healthy_on_loopback_alone(stack: Settings) -> None:
    found = status(stack)
    assert [service.service for service in found.services] == ["s3", "prefect", "mlflow", "worker"]
    assert found.healthy, found.services
    assert all(service.state == "running" and service.pid and service.detail == "" for service in found.services)
    pids = {process.pid for process in find_processes(stack.home)}
    listening = [c for c in psutil.net_connections("inet") if c.pid in pids and c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 10  # eight of SeaweedFS, Prefect, MLflow
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_a_second_up_starts_nothing_and_keeps_every_process(stack: Settings) -> None:
    before = {service.service: service.pid for service in status(stack).services}
    calls: list[Settings] = []
    again = up(stack, on_ready=calls.append)
    assert again.started == () and again.healthy and calls == []
    assert {service.service: service.pid for service in again.services} == before


def test_mlflow_lists_and_serves_what_lies_in_s3_to_one_without_credentials(stack: Settings) -> None:
    def mlflow(path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = ask(f"{stack.mlflow_tracking_uri}/api/2.0/mlflow/{path}", body)
        return answer

    location = f"s3://{stack.s3_bucket}/mlflow/test_stack"
    experiment = mlflow("experiments/create", {"name": "test_stack", "artifact_location": location})["experiment_id"]
    run = mlflow("runs/create", {"experiment_id": experiment, "start_time": 1})["run"]["info"]
    store = open_store(stack)
    store.put(f"{store.name_of(run['artifact_uri'])}/report/index.html", b"<h1>PROMOTE</h1>")
    listed = ask(f"{stack.mlflow_tracking_uri}/ajax-api/2.0/mlflow/artifacts/list?run_id={run['run_id']}&path=report")
    assert listed["files"] == [{"path": "report/index.html", "is_dir": False, "file_size": 16}]
    page = f"{stack.mlflow_tracking_uri}/get-artifact?path=report/index.html&run_uuid={run['run_id']}"
    assert urllib.request.urlopen(page, timeout=10).read() == b"<h1>PROMOTE</h1>"


def test_no_other_page_in_the_browser_may_talk_to_prefect(stack: Settings) -> None:
    def preflight(origin: str) -> str | None:
        request = urllib.request.Request(
            f"{stack.prefect_api_url}/flow_runs/filter",
            method="OPTIONS",
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        )
        try:
            return urllib.request.urlopen(request, timeout=10).headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as refusal:
            return refusal.headers.get("Access-Control-Allow-Origin")

    assert preflight("http://evil.example") is None
    assert preflight(f"http://localhost:{stack.prefect_port}") == f"http://localhost:{stack.prefect_port}"


def test_the_worker_hears_an_interrupt_and_starts_this_python(stack: Settings) -> None:
    """A process started from a shell's background ignores SIGINT, and hands that on to its children."""
    worker = psutil.Process(look_at(stack, "worker").pid)
    ignored = next(line for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines() if "SigIgn" in line)
    assert not int(ignored.split()[1], 16) & 0b10
    environment = worker.environ()
    assert environment["VARFLOW_HOME"] == str(stack.home)
    assert environment["PREFECT_API_URL"] == stack.prefect_api_url


def test_a_killed_store_comes_back_with_its_data(stack: Settings) -> None:
    open_store(stack).put("test_stack/kept", b"data")
    kill_and_await(stack, "s3")
    answer = open_store(stack).get("test_stack/kept")
    assert answer is not None and answer[0] == b"data"


def test_a_killed_mlflow_comes_back_though_its_child_still_held_the_port(stack: Settings) -> None:
    name = f"kept {time.time()}"
    ask(f"{stack.mlflow_tracking_uri}/api/2.0/mlflow/experiments/create", {"name": name})
    kill_and_await(stack, "mlflow")
    found = ask(f"{stack.mlflow_tracking_uri}/api/2.0/mlflow/experiments/search", {"max_results": 1000})
    assert name in [experiment["name"] for experiment in found["experiments"]]


def test_servers_elsewhere_are_named_and_nothing_is_started_for_them(stack: Settings, tmp_path: Path) -> None:
    """Another home whose settings point at this stack, as at a team's servers."""
    assert stack.s3_secret_key is not None
    settings = read_settings(
        **make_settings(tmp_path / "home").model_dump(include={"home", "s3_port", "prefect_port", "mlflow_port"}),
        s3_endpoint=stack.s3_endpoint,
        s3_access_key=stack.s3_access_key,
        s3_secret_key=stack.s3_secret_key.get_secret_value(),
        prefect_api_url=stack.prefect_api_url,
        mlflow_tracking_uri=stack.mlflow_tracking_uri,
    )
    said: list[str] = []
    found = up(settings, services=("s3", "prefect", "mlflow"), progress=said.append)
    assert found.started == ()
    assert [(service.state, service.healthy) for service in found.services] == [("external", True)] * 3
    assert any(f"MLflow is the one at {stack.mlflow_tracking_uri}" in line for line in said)
    assert find_processes(settings.home) == []
    assert not (settings.home / "credentials.json").exists()
