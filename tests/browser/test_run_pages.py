"""Prefect's pages of a run: its steps by name and state, its logs, its verdict with links that lead somewhere."""

import re
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun

from infra.settings import Settings
from tests.browser.pages import PATIENCE_SECONDS, Keep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(PATIENCE_SECONDS)]


def test_a_run_shows_its_steps_logs_and_verdict(page: Any, keep: Keep, stack: Settings, second: FlowRun) -> None:
    page.goto(f"{stack.prefect_ui_url}/runs/flow-run/{second.id}")
    page.get_by_text("found ingest/").first.wait_for()  # in the logs
    keep("prefect-run")
    page.get_by_role("tab", name="Task Runs").or_(page.get_by_text("Task Runs", exact=True)).first.click()
    rows = page.locator(".state-list-item")
    rows.filter(has_text="report").first.wait_for()
    page.mouse.wheel(0, 4000)
    rows.filter(has_text="mirror").first.wait_for()
    states = dict(row.inner_text().split("\n")[:2] for row in rows.all())
    before = {"mirror", "ingest", "score_rewards · preferences", "score_reference", "generate · champion"}
    after = {"train", "generate · challenger", "score_rewards · challenger", "gate", "promote", "report"}
    assert {name for name in before if states.get(name) == "Cached"} == before, states
    assert {name for name in after if states.get(name) == "Completed"} == after, states
    keep("prefect-run-tasks")
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text(re.compile("smoke: (PROMOTE|HOLD|REJECT)")).first.click()
    page.get_by_role("link", name="Report", exact=True).wait_for()
    targets = {
        name: page.get_by_role("link", name=name, exact=True).get_attribute("href")
        for name in ("Report", "MLflow run", "Prefect run", "train")
    }
    keep("prefect-verdict")
    assert targets["Prefect run"] == f"{stack.prefect_ui_url}/runs/flow-run/{second.id}"
    assert all(
        targets[name].startswith(f"{stack.mlflow_tracking_uri}/#/") for name in ("Report", "MLflow run", "train")
    )
    page.goto(targets["Report"])
    page.frame_locator("iframe").get_by_role("heading", level=1).wait_for()  # the report itself, in MLflow's viewer
