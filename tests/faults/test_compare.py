"""Models side by side and out of the store, by the command, on a real stack."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient
from transformers import AutoModelForCausalLM

from infra.settings import Settings
from infra.store import Store
from tests.faults.command import BENCHMARK, Command, words_of


@pytest.fixture
def trained(done: dict[str, Any]) -> str:
    """Give the reference of the model that the small recipe trained."""
    return next(f"train/{step['fingerprint']}" for step in done["steps"] if step["step"] == "train")


def test_a_run_against_its_base_and_again_for_nothing(
    varflow: Command, stack: Settings, store: Store, trained: str, done: dict[str, Any]
) -> None:
    told = varflow.ask("compare", "demo:tiny-policy", trained)
    found = told["comparison"]
    assert found["subjects"] == ["demo:tiny-policy", trained[:18]]
    (measure,) = found["benchmarks"]
    assert (measure["what"], measure["n"]) == ("mmlu_part", 2)
    assert found["reward"]["n"] == found["length"]["n"] == 4 and len(found["samples"]) == 4
    spans = [span for sample in found["samples"] for answer in sample["answers"] for span in answer]
    assert spans and all(span["logp"] is not None for span in spans), "both models were asked about every token"
    assert [step["step"] for step in told["steps"]] == ["score_tokens", "compare"]
    assert any(row["name"] == "train" and row["values"][1] > 0 for row in found["cost"])
    page = Path(told["report"]).read_text()
    assert trained in page and "fetches nothing" in page
    run = told["mlflow_run"].partition("/runs/")[2].partition("?")[0]
    client = MlflowClient(tracking_uri=stack.mlflow_tracking_uri)
    assert "compare/heldout_reward/2_minus_1" in client.get_run(run).data.metrics
    step = told["report_in_mlflow"].partition("/runs/")[2].partition("/")[0]
    shown_at = store.name_of(client.get_run(step).info.artifact_uri)
    files = {item.name.removeprefix(f"{shown_at}/") for item in store.scan(shown_at)}
    assert files == {"comparison.html", "comparison.json"}
    again = varflow.ask("compare", "demo:tiny-policy", done["mlflow_run"])
    assert again["comparison"]["refs"] == found["refs"] and again["comparison"]["reward"] is not None
    without = varflow.ask("compare", "demo:tiny-policy", trained, "--no-tokens")
    assert [step["step"] for step in without["steps"]] == ["compare"]
    shown = varflow.run("compare", "demo:tiny-policy", trained)
    assert shown.returncode == 0 and "mmlu_part (2)" in shown.stdout and told["report"] in shown.stdout


def test_what_was_measured_otherwise_is_refused_by_field(varflow: Command, trained: str, done: dict[str, Any]) -> None:
    other = words_of({"suite.benchmarks": [BENCHMARK | {"limit": 1}], "runtime.threads": 1})
    measured = varflow.ask("benchmark", "demo:tiny-policy", "--profile", "smoke", "--noise", *other)
    still = {"runs": 2, "flip_rate": 0.0, "max_difference": 0.0}
    varied = ["batch size", "number of workers"]  # asked without worked examples, so that no seed draws any
    assert measured["noise"] == {"mmlu_part": [{"varied": kind} | still for kind in varied]}
    assert [step["step"] for step in measured["steps"]] == ["mirror", "evaluate", *["evaluate_varied"] * 2, "noise"]
    # by their runs, which stand for what they measured: other tests may have measured the trained model since
    runs = [each["mlflow_run"].partition("/runs/")[2].partition("?")[0] for each in (done, measured)]
    told = varflow.refuse("compare", *runs)
    assert "mmlu_part: scores of different profiles are never compared" in told and "config.limit: 2 -> 1" in told
    assert "expected at least two models, each once" in varflow.refuse("compare", trained, trained)
    assert "at least 2 items" in varflow.refuse("compare", trained)


def test_a_model_of_the_store_is_looked_at_for_items_that_it_was_trained_on(
    varflow: Command, stack: Settings, trained: str
) -> None:
    words = words_of({"suite.benchmarks": [BENCHMARK], "runtime.threads": 1})
    told = varflow.ask("benchmark", trained, "--profile", "smoke", *words)
    assert [(step["step"], step["cached"]) for step in told["steps"]] == [
        ("mirror", True),
        ("evaluate", True),
        ("contamination", False),
    ]
    (found,) = told["contamination"]
    assert (found["benchmark"], found["items"], found["hits"], found["champion"]) == ("mmlu_part", 2, 0, None)
    assert found["challenger"] == found["challenger_clean"] and "mmlu_part" not in told["flags"]
    run = told["mlflow_run"].partition("/runs/")[2].partition("?")[0]
    shown = MlflowClient(tracking_uri=stack.mlflow_tracking_uri).get_run(run).data.metrics
    assert shown["eval/mmlu_part/in_training_data"] == 0
    outside = varflow.ask("benchmark", "demo:tiny-policy", "--profile", "smoke", *words)
    assert outside["contamination"] == [] and all(step["step"] != "contamination" for step in outside["steps"])


def test_a_model_leaves_the_store(varflow: Command, trained: str, tmp_path: Path) -> None:
    told = varflow.ask("export", trained, str(tmp_path / "model"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(told["files"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.model_type == "llama"
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        "| mmlu_part | acc | none |" in card
        and "## Verdict\n**" in card
        and "| train.base | demo:tiny-policy | apache-2.0 |" in card
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] > 0
    assert "got a place in use" in varflow.refuse("export", trained, str(tmp_path / "model"))
