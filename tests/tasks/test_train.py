"""What a training tells beyond its artifact: its figures in MLflow, and a warning where people look."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.tracking.client import MlflowClient
from prefect import flow

from infra.settings import Settings
from tasks.artifacts import open_digests
from tasks.execute import Execution
from tasks.score import score_reference
from tasks.step import Source
from tasks.train import train
from tests.faults.command import prefect_at
from training.config import Device, ReferenceScoreConfig, Runtime
from training.data.rows import RowsWriter
from training.data.schema import SCHEMA, digest_row
from training.objectives.lambdas import LambdaUnit
from training.objectives.var import ReferenceFactor, VarConfig


@pytest.fixture
def inputs(stack: Settings, tiny_policy: Path, tmp_path: Path) -> dict[str, Source]:
    """Prompts whose longer response has the better reward and, being longer, the smaller probability."""
    rows, rewards = [], []
    for i in range(4):
        turns, responses = [{"role": "user", "content": f"Question {i}?"}], ["A long answer, it is", "No"]
        row_id = digest_row(turns, responses)
        rows.append(
            {"row_id": row_id, "split": "train", "prompt": turns, "responses": responses, "preferred": None,
             "truncated": None, "logq": None, "source": "test", "line": i}
        )  # fmt: skip
        rewards.append({"row_id": row_id, "content_id": row_id, "reward": [1.0, 0.0]})
    for name in ("rows", "rewards"):
        (tmp_path / name).mkdir()
    with RowsWriter(tmp_path / "rows" / "rows.parquet", SCHEMA) as out:
        out.write(rows)
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps({"regime": "support"}))
    pq.write_table(pa.Table.from_pylist(rewards), tmp_path / "rewards" / "scores.parquet")
    folders = {"rows": tmp_path / "rows", "rewards": tmp_path / "rewards", "base": tiny_policy}
    return {name: Source(name, path, open_digests(stack).of(path)) for name, path in folders.items()}


def test_a_reward_that_is_not_heard_is_told_of_in_the_log_and_in_mlflow(
    stack: Settings, tmp_path: Path, inputs: dict[str, Source], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(device=Device.cpu, threads=1)
    scored = score_reference(
        ReferenceScoreConfig(max_tokens=96), {"rows": inputs["rows"], "reference": inputs["base"]}, runtime=runtime
    )
    config = VarConfig(
        reference_factor=ReferenceFactor.sum, lambda_unit=LambdaUnit.reward, lambda_=2.0, batch_prompts=4, max_tokens=96
    )
    planned = train(config, inputs | {"reference": scored}, runtime=runtime)
    settings = stack.model_copy(update={"home": tmp_path / "home"})

    @flow(name="unheard", persist_result=False)
    def chain() -> None:
        with Execution(settings, experiment="unheard", config={"name": "unheard"}) as execution:
            execution.steps(scored, planned)

    with prefect_at(stack):
        chain()
    assert (
        "train: only 0% of the prompts give their heaviest weight to the response with the best reward" in caplog.text
    )
    client = MlflowClient(stack.mlflow_tracking_uri)
    found = client.get_experiment_by_name("unheard")
    assert found
    (run,) = (run for run in client.search_runs([found.experiment_id]) if run.info.run_name == "train")
    figures = {name.removeprefix("train/"): value for name, value in run.data.metrics.items()}
    assert (figures["lambda"], figures["argmax_agreement"]) == (2.0, 0.0)
    assert figures["variance_reward_over_lambda"] == pytest.approx(0.125)  # of 1/2 and 0
    assert figures["variance_reference_factor"] > 0.125
