"""Prefect's pages of deployments: a run from the form, what the form shows, the schedule's switch. The run goes on meanwhile."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate

from flows.config import AlignConfig, TrainedReward
from infra.settings import Settings
from tests.browser.pages import LAMBDAS, PATIENCE_SECONDS, Keep, find_field, open_form, press
from training.objectives.sft import SftConfig

pytestmark = [pytest.mark.browser, pytest.mark.timeout(PATIENCE_SECONDS)]


def test_a_run_started_from_the_form_has_the_changed_field_and_all_others_as_they_were(
    started: dict[str, Any], align: str, smoke: dict[str, Any]
) -> None:
    changed = smoke | {"train": smoke["train"] | {"lambda_": LAMBDAS[0]}}
    assert started["deployment_id"] == align
    assert AlignConfig.model_validate(started["parameters"]["config"]) == AlignConfig.model_validate(changed)


def test_the_form_shows_titles_bounds_and_defaults(
    page: Any, keep: Keep, stack: Settings, align: str, smoke: dict[str, Any]
) -> None:
    open_form(page, stack, align)
    keep("prefect-form")
    assert "above 0" in find_field(page, "Lambda").inner_text()
    assert float(find_field(page, "Lambda").locator("input").input_value()) == smoke["train"]["lambda_"]
    assert find_field(page, "Policy").locator("textarea").input_value() == smoke["policy"]
    assert "between 0 and 1" in find_field(page, "Held-out fraction").inner_text()
    assert find_field(page, "Reference factor").inner_text().split("\n")[-1] == "mean"
    labels = page.locator(".schema-form-property__label").all_inner_texts()
    unnamed = [label for label in labels if "_" in label or re.search("[a-z][A-Z]", label)]
    assert unnamed == []  # neither a field without a title nor the name of a class
    assert page.get_by_role("button", name="VAR", exact=True).is_visible()
    find_field(page, "Lambda").scroll_into_view_if_needed()
    keep("prefect-form-training")


def test_the_form_draws_raw_json_for_what_the_gate_names_by_benchmark_alone(
    page: Any, stack: Settings, align: str
) -> None:
    open_form(page, stack, align)
    editors = page.locator(".schema-form-property:has(> .p-label__body .p-code-input)")
    titles = page.locator(".p-code-input").evaluate_all(
        "all => all.map(one => one.closest('.schema-form-property').querySelector('.schema-form-property__label').innerText)"
    )
    assert editors.count() > 0 and titles == ["Margins", "Targets (Optional)", "Floors (Optional)"]


def test_other_choices_come_from_the_form_complete(
    page: Any, keep: Keep, prefect: SyncPrefectClient, stack: Settings, align: str
) -> None:
    open_form(page, stack, align)
    page.get_by_role("button", name="SFT", exact=True).click()
    find_field(page, "Responses").wait_for()
    page.get_by_role("button", name="train one", exact=True).click()
    find_field(page, "Base model").wait_for()
    keep("prefect-form-other-choices")
    prefect.update_work_pool(stack.work_pool, WorkPoolUpdate(is_paused=True))  # nothing is to come of this run
    try:
        run = press(page, page.get_by_role("button", name="Submit", exact=True), "/create_flow_run")
        prefect.delete_flow_run(run["id"])
    finally:
        prefect.update_work_pool(stack.work_pool, WorkPoolUpdate(is_paused=False))
    asked = AlignConfig.model_validate(run["parameters"]["config"])
    assert asked.train == SftConfig()
    assert asked.reward == TrainedReward()


def test_a_schedule_switched_by_the_user_stays_so_when_the_stack_starts_again(
    page: Any,
    keep: Keep,
    prefect: SyncPrefectClient,
    register: Callable[[], None],
    stack: Settings,
    align: str,
    smoke: dict[str, Any],
) -> None:
    def active() -> list[bool]:
        return [schedule.active for schedule in prefect.read_deployment(align).schedules]

    page.goto(f"{stack.prefect_ui_url}/deployments/deployment/{align}")
    switch = page.locator(".deployment-schedule-card").get_by_role("switch")
    assert (switch.get_attribute("aria-checked"), active()) == ("false", [False])  # present and off
    for wanted in ("true", "false"):
        press(page, switch, f"{align}/schedules/")
        assert active() == [wanted == "true"]  # Prefect's own page may be late to show it
        register()
        page.reload()
        page.locator(f".deployment-schedule-card [role=switch][aria-checked={wanted}]").wait_for()
        keep(f"prefect-schedule-{'on' if wanted == 'true' else 'off'}")
        assert active() == [wanted == "true"]
    assert prefect.read_deployment(align).parameters == {"config": smoke}  # nor are the user's parameters set back


def test_the_deployments_are_on_one_page_with_their_schedules(
    page: Any, keep: Keep, stack: Settings, align: str
) -> None:
    page.goto(f"{stack.prefect_ui_url}/deployments")
    for text in ("align", "retrain", "sweep", "benchmark", "At 02:00 AM every day", "Every 15 minutes"):
        page.get_by_text(text).first.wait_for()
    keep("prefect-deployments")
