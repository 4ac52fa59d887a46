"""Chromium beside a real stack: deployments registered, one short run started from the form, another one like it.

Screenshots land in `screenshots/` at the top of the tree, which git ignores: they are there to be looked at.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun

from infra.settings import Settings
from tests.browser.pages import (
    LAMBDAS,
    PATIENCE_SECONDS,
    ROOT,
    Keep,
    find_field,
    open_form,
    open_page,
    press,
    save,
)

REGISTER = (
    "from infra.settings import read_settings; from flows.cli import register_deployments;"
    "register_deployments(read_settings())"
)


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """Give a page of its own to a test."""
    page = open_page(chromium)
    yield page
    page.context.close()


@pytest.fixture
def keep(page: Any) -> Keep:
    """Give a function that keeps a screenshot of the test's page."""
    return lambda name: save(page, name)


@pytest.fixture(scope="session")
def prefect(stack: Settings) -> Iterator[SyncPrefectClient]:
    """Give a client of Prefect's API."""
    with SyncPrefectClient(stack.prefect_api_url) as client:
        yield client


@pytest.fixture(scope="session")
def register(stack: Settings) -> Callable[[], None]:
    """Give what `varflow up` does about the deployments, in a process of its own."""

    def run() -> None:
        environment = dict(os.environ) | stack.own_environment()
        subprocess.run([sys.executable, "-c", REGISTER], check=True, cwd=ROOT, env=environment)

    return run


@pytest.fixture(scope="session")
def smoke() -> dict[str, Any]:
    """Give the smoke recipe as parameters, with one benchmark instead of two."""
    from flows import recipes

    config = recipes.smoke().model_dump(mode="json")
    config["suite"]["benchmarks"] = config["suite"]["benchmarks"][:1]
    kept = config["suite"]["benchmarks"][0]["name"]
    config["gate"]["margins"] = {kept: config["gate"]["margins"][kept]}
    return config


@pytest.fixture(scope="session")
def align(prefect: SyncPrefectClient, register: Callable[[], None], smoke: dict[str, Any]) -> str:
    """Give the id of the deployment `align`, its parameters set to the smoke recipe."""
    register()
    found = prefect.read_deployment_by_name("align/align")
    prefect.update_deployment(found.id, DeploymentUpdate(parameters={"config": smoke}))
    return str(found.id)


@pytest.fixture(scope="session")
def started(chromium: Any, stack: Settings, align: str) -> dict[str, Any]:
    """Start a run from the form with another lambda and give the flow run, as the server's answer to the form."""
    page = open_page(chromium)
    open_form(page, stack, align)
    find_field(page, "Lambda").locator("input").fill(str(LAMBDAS[0]))
    save(page, "prefect-form-filled")
    run = press(page, page.get_by_role("button", name="Submit", exact=True), "/create_flow_run")
    page.context.close()
    return dict(run)


def wait_until_done(prefect: SyncPrefectClient, run: Any) -> FlowRun:
    """Return a flow run once it is in its last state, which has to be Completed."""
    deadline = time.monotonic() + PATIENCE_SECONDS / 2
    while time.monotonic() < deadline:
        found = prefect.read_flow_run(run)
        if found.state and found.state.is_final():
            assert found.state.is_completed(), found.state
            return found
        time.sleep(2)
    raise AssertionError(f"run {run} was still {found.state_name} after {PATIENCE_SECONDS / 2:.0f} s")


@pytest.fixture(scope="session")
def first(prefect: SyncPrefectClient, started: dict[str, Any]) -> FlowRun:
    """Give the run that the form started, done."""
    return wait_until_done(prefect, started["id"])


@pytest.fixture(scope="session")
def second(prefect: SyncPrefectClient, first: FlowRun, smoke: dict[str, Any]) -> FlowRun:
    """Give a second run, done: another lambda, everything before training found."""
    config = smoke | {"train": smoke["train"] | {"lambda_": LAMBDAS[1]}}
    assert first.deployment_id is not None
    asked = prefect.create_flow_run_from_deployment(first.deployment_id, parameters={"config": config})
    return wait_until_done(prefect, asked.id)
