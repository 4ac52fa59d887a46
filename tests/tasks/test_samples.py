"""Answers while training, on a real MLflow: a table of the run while it goes on, and one in the artifact."""

import json
import urllib.request
from pathlib import Path

from infra.settings import Settings
from infra.store import open_store
from infra.tracking import Tracking
from tasks.samples import TABLE, SamplesMirror
from training.job import ANSWERS_FILE


def write(path: Path, *steps: int) -> None:
    lines = [
        {"step": step, "row_id": "a" * 32, "prompt": "Why?", "answer": f"é {step}", "truncated": False}
        for step in steps
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "row')


def test_answers_are_a_table_of_the_run_as_soon_as_they_are_there(stack: Settings, tmp_path: Path) -> None:
    store, tracking = open_store(stack), Tracking(stack.mlflow_tracking_uri)
    location = store.url("mlflow/test_samples")
    run = tracking.start_run(tracking.ensure_experiment("test_samples", artifact_location=location), name="t", tags={})
    mirror = SamplesMirror(tmp_path, store=store, tracking=tracking, run=run)

    def shown() -> dict[str, list[object]]:
        page = f"{stack.mlflow_tracking_uri}/get-artifact?path={TABLE}&run_uuid={run.id}"
        table: dict[str, list[object]] = json.loads(urllib.request.urlopen(page, timeout=60).read())
        return table

    mirror()  # nothing there yet
    write(tmp_path / ANSWERS_FILE, 0)
    mirror()
    assert shown() == {
        "columns": ["step", "prompt", "answer", "truncated"], "data": [[0, "Why?", "é 0", False]],
    }  # fmt: skip
    write(tmp_path / ANSWERS_FILE, 0, 50)
    mirror()  # too soon after the last time
    assert len(shown()["data"]) == 1
    mirror.close()
    assert [row[0] for row in shown()["data"]] == [0, 50]
    assert json.loads((tmp_path / TABLE).read_bytes()) == shown()
    tags = tracking.find_tags(run.id)
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": TABLE, "type": "table"}]
    tracking.finish(run.id, status="FINISHED")


def test_without_answers_there_is_no_table(tmp_path: Path, stack: Settings) -> None:
    store, tracking = open_store(stack), Tracking(stack.mlflow_tracking_uri)
    location = store.url("mlflow/test_samples")
    run = tracking.start_run(tracking.ensure_experiment("test_samples", artifact_location=location), name="t", tags={})
    SamplesMirror(tmp_path, store=store, tracking=tracking, run=run).close()
    assert not list(tmp_path.iterdir()) and "mlflow.loggedArtifacts" not in tracking.find_tags(run.id)
    tracking.finish(run.id, status="FINISHED")
