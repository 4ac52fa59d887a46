"""What can be asked after a run: lineage, report, benchmark."""

import re
from pathlib import Path
from typing import Any

from infra import records
from infra.store import Store
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
        f"{again['mlflow_run']}/artifacts/report.html?raw=1",
        f"report/{done['steps'][-1]['fingerprint']}",
    ):
        page = Path(varflow.ask("report", run)["report"])
        assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()[:200]
        assert str(page) == done["report"]
    told = varflow.refuse("report", "nobody")
    assert "run 'nobody': it has no report" in told


def test_a_verdict_is_explained_and_held_against_what_is_on_record(
    varflow: Command, store: Store, done: dict[str, Any]
) -> None:
    fingerprint = next(step["fingerprint"] for step in done["steps"] if step["step"] == "gate")
    for run in (done["prefect_run"].rpartition("/")[2], done["mlflow_run"], f"gate/{fingerprint}"):
        told = varflow.ask("gate", "--explain", run)
        assert (told["decision"], told["reasons"], told["ref"]) == (
            done["verdict"],
            done["reasons"],
            f"gate/{fingerprint}",
        )
        assert told["seal_holds"] is True and told["inputs_checked"] == len(told["inputs"])
    files = {name.partition("/")[0] for name in told["inputs"]}
    assert files == {"challenger", "champion", "rows"} | {
        f"{who}_{what}" for who in ("challenger", "champion") for what in ("rewards", "answers", "eval_mmlu_part")
    }
    assert [guard["benchmark"] for guard in told["guards"]] == ["mmlu_part"]
    assert "guard mmlu_part" in varflow.run("gate", "--explain", f"gate/{fingerprint}").stdout
    assert "got a train, expected gate/FINGERPRINT" in varflow.refuse(
        "gate", "--explain", f"train/{next(s['fingerprint'] for s in done['steps'] if s['step'] == 'train')}"
    )
    # One rewritten record of an input: what the gate weighed is no longer what is there.
    rewards = told["inputs"]["challenger_rewards/scores.parquet"]
    weighed = records.resolve(store, f"gate/{fingerprint}").inputs[
        "challenger_rewards"
    ]  # the champion's may be the same bytes
    record = records.resolve(store, f"score_rewards/{weighed}")
    name = records.record_name(record.step, record.fingerprint)
    kept = store.get(name)
    assert kept is not None
    try:
        etag = store.put(name, kept[0].replace(rewards.encode(), b"0" * 64), replace=kept[1])
        refused = varflow.refuse("gate", "--explain", f"gate/{fingerprint}")
        assert "1 of its inputs are not what it weighed: challenger_rewards/scores.parquet" in refused
    finally:
        store.put(name, kept[0], replace=etag)


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
