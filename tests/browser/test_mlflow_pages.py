"""MLflow's pages: a run with its steps, figures and files, the report in the viewer, two runs side by side."""

import json
import re
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun

from infra.settings import Settings
from tests.browser.pages import LAMBDAS, PATIENCE_SECONDS, Keep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(PATIENCE_SECONDS)]

TRAINING = "workflowType=machine_learning"


@pytest.fixture(scope="module")
def runs(stack: Settings, second: FlowRun) -> list[dict[str, Any]]:
    """Give all MLflow runs of the two flow runs, oldest first."""
    api = f"{stack.mlflow_tracking_uri}/api/2.0/mlflow"
    with httpx.Client(timeout=120, trust_env=False) as client:
        found = client.get(f"{api}/experiments/get-by-name", params={"experiment_name": "smoke"}).raise_for_status()
        experiment = found.json()["experiment"]["experiment_id"]
        body = {"experiment_ids": [experiment], "order_by": ["attributes.start_time ASC"], "max_results": 200}
        return list(client.post(f"{api}/runs/search", json=body).raise_for_status().json()["runs"])


def read_tags(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def list_parents(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if "mlflow.parentRunId" not in read_tags(run)]


def locate(stack: Settings, run: dict[str, Any], place: str = "") -> str:
    info = run["info"]
    return f"{stack.mlflow_tracking_uri}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}{place}?{TRAINING}"


def test_steps_are_children_of_depth_one_and_cached_ones_make_none(runs: list[dict[str, Any]]) -> None:
    parents = {run["info"]["run_id"] for run in list_parents(runs)}
    children = [run for run in runs if run["info"]["run_id"] not in parents]
    assert len(parents) == 2
    assert {read_tags(run)["mlflow.parentRunId"] for run in children} == parents
    steps = [run["info"]["run_name"] for run in children]
    assert (steps.count("ingest"), steps.count("train")) == (1, 2)
    assert {run["info"]["status"] for run in runs} == {"FINISHED"}


def test_a_run_shows_verdict_figures_parameters_and_its_steps(
    page: Any, keep: Keep, stack: Settings, runs: list[dict[str, Any]]
) -> None:
    parent = list_parents(runs)[0]
    page.goto(locate(stack, parent))
    page.locator("a[href^='#/']").filter(has_text=re.compile("^report$")).wait_for()
    for heading in ("Description", "Child runs", "Parameters (", "Metrics ("):
        page.get_by_text(heading).first.wait_for()
    page.get_by_placeholder("Search parameters").fill("train.lambda_")
    page.get_by_text(str(LAMBDAS[0]), exact=True).first.wait_for()
    keep("mlflow-run")
    page.locator("a[href^='#/']").filter(
        has_text=re.compile("^gate$")
    ).click()  # a child, not a link of the description
    page.get_by_text("Parent run").first.wait_for()


def test_a_training_run_shows_its_curves_and_files(
    page: Any, keep: Keep, stack: Settings, runs: list[dict[str, Any]]
) -> None:
    train = next(run for run in runs if run["info"]["run_name"] == "train")
    page.goto(locate(stack, train, "/model-metrics"))
    page.locator(".js-plotly-plot path.js-line").first.wait_for(state="attached")
    page.get_by_placeholder("Search metric charts").fill("loss")
    page.get_by_text("loss", exact=True).first.wait_for()
    page.get_by_placeholder("Search metric charts").fill("ess")
    page.get_by_text("ess", exact=True).first.wait_for()
    page.get_by_text("loss", exact=True).first.wait_for(state="detached")
    page.locator(".js-plotly-plot path.js-line").first.wait_for()
    keep("mlflow-train-curves")
    page.goto(locate(stack, train, "/artifacts"))
    for name in ("model.safetensors", "weights.parquet", "metrics.jsonl"):
        page.get_by_text(name, exact=True).first.wait_for()
    keep("mlflow-train-files")


def test_the_report_is_previewed_among_the_artifacts(
    page: Any, keep: Keep, stack: Settings, runs: list[dict[str, Any]]
) -> None:
    report = next(run for run in runs if run["info"]["run_name"] == "report")
    page.goto(locate(stack, report, "/artifacts/report.html"))
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", level=1).wait_for()
    frame.locator("svg.main-svg").first.wait_for(state="attached")  # its charts are drawn there too
    assert any(word in frame.locator("body").inner_text() for word in ("PROMOTE", "HOLD", "REJECT"))
    keep("mlflow-report")


def test_two_runs_side_by_side(page: Any, keep: Keep, stack: Settings, runs: list[dict[str, Any]]) -> None:
    parents = list_parents(runs)
    experiment = parents[0]["info"]["experiment_id"]
    page.goto(f"{stack.mlflow_tracking_uri}/#/experiments/{experiment}/runs?{TRAINING}")
    for parent in parents:
        page.get_by_role("link", name=parent["info"]["run_name"]).first.wait_for()
    keep("mlflow-runs")
    ids = quote(json.dumps([parent["info"]["run_id"] for parent in parents]))
    page.goto(
        f"{stack.mlflow_tracking_uri}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment]))}&{TRAINING}"
    )
    page.get_by_text("Comparing 2 Runs").wait_for()
    keep("mlflow-compare")
    for table in ("Parameters", "Metrics"):
        page.get_by_role("switch", name=f"{table} - Show diff only").click()
    row = page.get_by_role("row").filter(has_text="train.lambda_")
    row.scroll_into_view_if_needed()
    assert [cell.strip() for cell in row.inner_text().split("\t")] == ["train.lambda_", *map(str, LAMBDAS)]
    keep("mlflow-compare-differences")
    assert page.get_by_text("ingest.format", exact=True).count() == 0  # the same in both
    page.get_by_text("cost/wall_seconds", exact=True).hover()
    metric = page.get_by_text("train/mean_ess", exact=True)
    for _ in range(50):  # the table draws what is in sight, alone
        if metric.count() and metric.is_visible():
            break
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
    metric.wait_for()
    keep("mlflow-compare-metrics")
