"""What can be asked after a run: lineage, report, benchmark."""

import re
from pathlib import Path
from typing import Any

from tests.faults.command import Command, small


def test_lineage_leads_back_to_the_sources_and_on_to_the_report(varflow: Command, done: dict[str, Any]) -> None:
    prints = {step["step"]: step["fingerprint"] for step in done["steps"]}
    trained = f"train/{prints['train']}"
    found = varflow.ask("lineage", trained)
    assert found["ref"] == trained and found["inputs"].keys() == {"rows", "base", "rewards", "reference"}
    assert found["inputs"]["rows"]["ref"] == f"ingest/{prints['ingest']}"
    assert found["inputs"]["rows"]["inputs"]["source"].keys() == {"source"}
    assert f"report/{prints['report']}" in [use["ref"] for use in found["used_by"]]
    assert varflow.ask("lineage", prints["train"][:12])["ref"] == trained
    told = varflow.refuse("lineage", "train/ffffffff")
    assert "got 0 records that match, expected one" in told


def test_the_report_is_found_by_its_run(varflow: Command, done: dict[str, Any]) -> None:
    again = varflow.ask("run", "smoke", *small())  # finds the report, and it is this run's as well
    for run in (
        done["prefect_run"].rpartition("/")[2],
        again["mlflow_run"],
        f"report/{done['steps'][-1]['fingerprint']}",
    ):
        page = Path(varflow.ask("report", run)["report"])
        assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()[:200]
        assert str(page) == done["report"]
    told = varflow.refuse("report", "nobody")
    assert "run 'nobody': it has no report" in told


def test_a_benchmark_of_a_model(varflow: Command, done: dict[str, Any]) -> None:
    found = varflow.ask("benchmark", "demo:tiny-policy", "--suite", "smoke", "--set", "runtime.threads=1")
    assert {"eval/mmlu_part/acc", "eval/gsm8k_part/exact_match"} <= found["scores"].keys()
    assert {step["step"] for step in found["steps"]} == {"mirror", "evaluate"}
    assert {"prefect_run", "mlflow_run"} <= found.keys()


def test_a_plan_after_a_run_goes_by_what_it_measured(varflow: Command, done: dict[str, Any]) -> None:
    plan = varflow.ask("plan", "smoke", *small())
    assert re.search(r"measured in train/[0-9a-f]{12}$", plan["machine"]["basis"])
    assert "rows of the ingest artifact, by the policy's tokenizer" in plan["data_basis"]
    assert varflow.ask("plan", "smoke", *small(), "--mfu", "0.5")["machine"]["mfu"] == 0.5
