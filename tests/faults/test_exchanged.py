"""Weights that are exchanged under a run's feet: no score of the others comes under the first ones' name."""

import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from evaluation.config import SuiteConfig
from flows.benchmark import BenchmarkPlan, plan_benchmark
from flows.config import BenchmarkFlowConfig
from infra import records
from infra.settings import Settings
from infra.store import Store
from tasks.child import InputChanged
from tasks.execute import Execution
from tasks.sources import DEMO
from tests.faults.command import BENCHMARK, Command, prefect_at, record_of

POLICY = DEMO / "tiny-policy"
WEIGHTS = "model.safetensors"


def flip_a_bit(file: Path) -> None:
    """Change a model's last weight: the same size, still a model."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@flow(name="late", persist_result=False)
def run_late(plan: BenchmarkPlan, settings: Settings) -> Any:
    """Run a suite that was planned before."""
    assert plan.mirror
    with Execution(settings, experiment="late", config={}) as run:
        run.steps(plan.mirror, *plan.evaluations)


def test_a_model_folder_exchanged_after_the_plan_has_no_score(
    stack: Settings, store: Store, done: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(POLICY, folder)
    (folder / "unlike.txt").write_text(uuid.uuid4().hex)
    config = BenchmarkFlowConfig(
        model=str(folder), benchmarks="demo:benchmarks", suite=SuiteConfig.model_validate({"benchmarks": [BENCHMARK]})
    )
    plan = plan_benchmark(config, store=store, settings=stack)
    flip_a_bit(folder / WEIGHTS)
    with (
        prefect_at(stack),
        pytest.raises(InputChanged, match=r"evaluate · mmlu_part: its input model, /.*policy at .* has digest"),
    ):
        run_late(plan, stack)
    (planned,) = plan.evaluations
    assert store.stat(records.record_name("evaluate", planned.fingerprint)) is None


def test_a_trained_model_edited_on_this_machine_is_refused_until_it_is_fetched_again(
    varflow: Command, store: Store, stack: Settings, done: dict[str, Any]
) -> None:
    trained = record_of(store, done, "train")
    copy = stack.home / "artifacts" / trained.attempt
    kept = (copy / WEIGHTS).read_bytes()
    flip_a_bit(copy / WEIGHTS)
    words = ("benchmark", f"train/{trained.fingerprint}", "--profile", "smoke")
    told = varflow.refuse(*words)
    assert f"train/{trained.fingerprint[:12]}: its copy {copy} has digest" in told and "remove that folder" in told
    shutil.rmtree(copy)
    varflow.ask(*words)
    assert (copy / WEIGHTS).read_bytes() == kept
