"""The deployments table: what it holds, and that what the user set on the server stays."""

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.schedules import CronSchedule

from flows.deployments import register, table
from infra.settings import Settings
from infra.stack import down, up
from tests.faults.command import Command, prefect_at
from tests.faults.deployment import run_python


@pytest.fixture
def client(stack: Settings, deployed: None) -> Iterator[SyncPrefectClient]:
    """Give a client of the session's Prefect, the deployments registered."""
    with prefect_at(stack), get_client(sync_client=True) as client:
        yield client


def test_the_table() -> None:
    """A change of names, schedules or triggers has to show here."""
    rows = {
        entry.name: (
            [(s.schedule.model_dump(include={"cron", "interval"}, mode="json"), s.active) for s in entry.schedules],
            [(sorted(t.expect), t.match.root, t.threshold, t.schedule_after.seconds) for t in entry.triggers],
        )
        for entry in table()
    }
    landed = (["preferences.landed"], {"prefect.resource.id": "prefs.*"}, 1, 20)
    assert rows == {
        "align/align": ([({"cron": "0 2 * * *"}, False)], []),
        "retrain/retrain": ([({"cron": "0 3 * * *"}, False)], [landed]),
        "sweep/sweep": ([({"interval": 900.0}, True)], []),
        "benchmark/benchmark": ([], []),
        "judge/judge": ([], []),
        "benchmark/nightly": ([({"cron": "0 4 * * *"}, False)], []),
        "compare/compare": ([], []),
    }


def state_of(client: SyncPrefectClient) -> dict[str, Any]:
    """Return what a user may have set on each deployment, and what tells one deployment from another."""
    found = {}
    for entry in table():
        held = client.read_deployment_by_name(entry.name)
        schedules = [(s.id, s.active, s.schedule.model_dump(mode="json")) for s in held.schedules]
        found[entry.name] = (held.id, held.parameters, held.paused, schedules)
    return found


def test_registered_again_everything_of_the_users_stays(stack: Settings, client: SyncPrefectClient) -> None:
    align = client.read_deployment_by_name("align/align")
    client.update_deployment_schedule(
        align.id, align.schedules[0].id,
        active=True, schedule=CronSchedule(cron="30 5 * * 1", timezone="Europe/Berlin"),
    )  # fmt: skip
    changed = align.parameters | {"config": align.parameters["config"] | {"name": "mine"}}
    client.update_deployment(align.id, DeploymentUpdate(parameters=changed, description="old"))
    before = state_of(client)
    assert register(stack) == [] == register(stack)
    assert state_of(client) == before
    (schedule,) = client.read_deployment_by_name("align/align").schedules
    assert schedule.active and schedule.schedule.cron == "30 5 * * 1"
    assert before["align/align"][1]["config"]["name"] == "mine"
    assert client.read_deployment_by_name("align/align").description == table()[0].description


def test_what_the_worker_starts_is_a_flow_of_a_module(client: SyncPrefectClient) -> None:
    for entry in table():
        module, _, name = str(client.read_deployment_by_name(entry.name).entrypoint).rpartition(".")
        assert getattr(importlib.import_module(module), name) is not None


def test_each_field_of_a_form_has_a_title_and_a_description(client: SyncPrefectClient) -> None:
    for entry in table():
        schema = client.read_deployment_by_name(entry.name).parameter_openapi_schema
        definitions = schema.get("definitions", {})
        for name, definition in definitions.items():
            for field, own in definition.get("properties", {}).items():
                shown = definitions.get(own.get("$ref", "").rpartition("/")[2], {}) | own
                assert shown.get("title"), f"{entry.name}: {name}.{field} has no title"
                assert shown.get("description") or "const" in shown, f"{entry.name}: {name}.{field} has no description"


def test_what_our_own_loggers_warn_of_stands_on_the_runs_page(
    varflow: Command, stack: Settings, client: SyncPrefectClient
) -> None:
    warn = "lambda: logging.getLogger('varflow.train').warning('only 45% of the prompts')"
    run_python(varflow, f"import logging; from prefect import flow; flow(name='warns', persist_result=False)({warn})()")
    (run,) = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["warns"])))
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
    assert [log.level for log in logs if log.message == "only 45% of the prompts"] == [logging.WARNING]


@pytest.mark.slow
def test_a_restart_of_the_stack_keeps_them(stack: Settings, deployed: None) -> None:
    with prefect_at(stack):
        with get_client(sync_client=True) as client:
            before = state_of(client)
        down(stack)
        up(stack, on_ready=register)
        with get_client(sync_client=True) as client:
            assert state_of(client) == before


def test_parameters_of_an_older_version_become_the_defaults_and_schedules_stay(
    stack: Settings, client: SyncPrefectClient
) -> None:
    before = client.read_deployment_by_name("align/align")
    older = before.parameters["config"] | {"ingest": before.parameters["config"]["ingest"] | {"schema_version": 0}}
    client.update_deployment(
        before.id,
        DeploymentUpdate(parameters={"config": older}, parameter_openapi_schema={}, enforce_parameter_schema=False),
    )
    client.update_deployment(before.id, DeploymentUpdate(enforce_parameter_schema=True))
    with prefect_at(stack):
        assert register(stack) == []
    after = client.read_deployment_by_name("align/align")
    assert after.parameters == next(entry for entry in table() if entry.name == "align/align").parameters
    assert after.id == before.id and after.schedules == before.schedules
