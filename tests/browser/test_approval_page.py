"""Prefect's page of a run that waits for a person: what is asked, with the report one press away, and the answer."""

from typing import Any

import pytest

from infra.settings import Settings
from tests.browser.pages import PATIENCE_SECONDS, Keep, press
from tests.faults.command import prefect_at
from tests.faults.test_approval import REPORT, paused

pytestmark = [pytest.mark.browser, pytest.mark.timeout(PATIENCE_SECONDS)]


def test_a_promotion_is_approved_on_the_runs_page(page: Any, keep: Keep, stack: Settings) -> None:
    outcome: dict[str, Any] = {}
    with prefect_at(stack), paused(outcome) as (_, run):
        page.goto(f"{stack.prefect_ui_url}/runs/flow-run/{run.id}")
        page.get_by_role("button", name="Resume", exact=True).first.click()
        page.get_by_text("The gate says PROMOTE for policy.").wait_for()
        assert page.get_by_role("link", name="the report", exact=True).get_attribute("href") == REPORT
        page.get_by_text("mmlu: not worse", exact=True).wait_for()
        page.get_by_text("mmlu, champion: chance", exact=True).wait_for()
        form = page.locator("[role=dialog], .p-modal").filter(has_text="Resume Flow Run").last
        form.locator("textarea").fill("read it")
        form.get_by_role("switch").click()
        keep("prefect-approval")
        press(page, form.get_by_role("button", name="Submit", exact=True), "/resume")
    assert outcome["promote"] is True
    assert "read it" in outcome["said"]
