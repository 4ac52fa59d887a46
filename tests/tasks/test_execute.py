"""Committing beside the next step: what is read before it is up, what is recorded first, what a failure leaves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient
from prefect import flow

from flows.plan import DEMO
from infra import records
from infra.settings import Settings
from infra.store import Store, open_store
from tasks import execute
from tasks.artifacts import open_digests, place_output
from tasks.child import InputChanged, UserError
from tasks.execute import Execution
from tasks.ingest import ingest
from tasks.step import Attempt, Metrics, Planned, Source, Step, Work
from tests.faults.command import prefect_at
from tests.faults.held_store import HeldStore
from training.config import Config, Device, IngestConfig, ResponseRegime, Runtime
from training.job import read_json_lines
from training.objectives.sft import SftConfig
from training.weights import digest_weights


class Named(Config):
    """Tells the artifacts of one test from those of the others."""

    name: str


def weights(config: Named, attempt: Attempt) -> Metrics:
    """Stand for a training: a file, and two figures."""
    (attempt.output / "weights.txt").write_text(config.name)
    (attempt.output / "summary.json").write_text("{}")
    return {"loss/last": 0.5}


def plan(name: str, work: Work, *inputs: Planned) -> Planned:
    """Plan a step whose work is any function."""
    return Step(work.__name__, 1, work, "")(
        Named(name=name), {given.step.name: given for given in inputs}, runtime=Runtime()
    )


@pytest.fixture
def servers(stack: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Give the stack with a home of its own, where even the smallest artifact is committed beside the next step."""
    monkeypatch.setattr(execute, "COMMIT_BESIDE_BYTES", -1)
    with prefect_at(stack):
        yield stack.model_copy(update={"home": tmp_path / "home"})


def run(settings: Settings, name: str, *items: Planned) -> Execution:
    """Bring steps to their artifacts in a flow of their own."""

    @flow(name=name, persist_result=False)
    def chain() -> Any:
        with Execution(settings, experiment=name, config={"name": name}) as execution:
            execution.steps(*items)
        return execution

    ended: Execution = chain()
    return ended


def read_runs(settings: Settings, experiment: str) -> dict[str, Any]:
    """Return the MLflow runs of an experiment by name; the parent's name is drawn, and stands as `parent`."""
    client = MlflowClient(settings.mlflow_tracking_uri)
    found = client.get_experiment_by_name(experiment)
    assert found
    runs = client.search_runs([found.experiment_id])
    return {run.info.run_name if "mlflow.parentRunId" in run.data.tags else "parent": run for run in runs}


def test_the_next_step_reads_an_artifact_that_is_not_up_yet(servers: Settings) -> None:
    store, seen = open_store(servers), {}
    first = plan("beside", weights)

    def reader(config: Named, attempt: Attempt) -> Metrics:
        assert proxy.reached.wait(60), "the record of the weights is on its way"
        seen["text"] = (attempt.inputs["weights"] / "weights.txt").read_text()
        seen["found"] = records.find(store, step="weights", fingerprint=first.fingerprint)
        proxy.release.set()
        return {}

    second = plan("beside", reader, first)
    assert servers.s3_endpoint
    held = f"PUT /{servers.s3_bucket}/records/weights/".encode()
    with HeldStore(servers.s3_endpoint, held=held, pass_request=False) as proxy:
        ended = run(servers.model_copy(update={"s3_endpoint": proxy.endpoint}), "beside", first, second)
    assert seen == {"text": "beside", "found": None}
    written = [store.stat(records.record_name(planned.step.name, planned.fingerprint)) for planned in (first, second)]
    assert written[0] and written[1] and written[0].modified <= written[1].modified
    assert ended.folder(ended.ref(first)).name == ended.ref(first).record.attempt
    assert not list((servers.home / "work").glob("*/*/")), "nothing is left to go on with"


def test_mlflow_is_told_everything_though_no_step_waits_for_it(servers: Settings) -> None:
    ended = run(servers, "told", plan("told", weights))
    runs, record = read_runs(servers, "told"), ended.ref(ended.done[0]).record
    assert {name: run.info.status for name, run in runs.items()} == {"parent": "FINISHED", "weights": "FINISHED"}
    assert runs["weights"].data.params == {"name": "told"} == runs["parent"].data.params
    assert runs["weights"].data.metrics == {"loss/last": 0.5}
    assert runs["weights"].data.tags["varflow.record"] == f"weights/{record.fingerprint}"
    seconds = record.cost["wall_seconds"]
    assert runs["parent"].data.metrics == {
        "loss/last": 0.5,
        "wall_seconds/weights": seconds,
        "cost/wall_seconds": seconds,
    }


def test_a_priced_step_has_its_usd_on_its_own_run_and_on_the_parent(servers: Settings) -> None:
    ended = run(servers.model_copy(update={"usd_per_hour": 3600.0}), "priced", plan("priced", weights))
    record = ended.ref(ended.done[0]).record
    assert record.cost["usd"] == pytest.approx(record.cost["wall_seconds"], abs=1e-3)
    assert record.provenance["price"] == "3600 USD an hour and device, given"
    runs = read_runs(servers, "priced")
    assert runs["weights"].data.metrics["cost/usd"] == record.cost["usd"]
    told = runs["parent"].data.metrics
    assert (told["cost/usd"], told["cost/unpriced_seconds"]) == (record.cost["usd"], 0.0)


@pytest.mark.parametrize(
    ("name", "label", "placed"),
    [
        ("reward/mean", "challenger", "reward/mean"),
        ("reward/mean", "champion", "reward/mean_champion"),
        ("reward/mean", "preferences", "preferences/reward/mean"),
        ("eval/mmlu/acc", "mmlu champion", "eval/mmlu/acc_champion"),
        ("eval/gsm8k/exact_match", "gsm8k 1235 noise", "noise/eval/gsm8k/exact_match"),
        ("reward/mean", "hha_helpful challenger", "hha_helpful/reward/mean"),
        ("reward/mean", "hha_helpful baseline", "hha_helpful/reward/mean_baseline"),
        ("eval/hha_helpful/win_rate", "hha_helpful", "eval/hha_helpful/win_rate"),
    ],
)
def test_no_figure_takes_the_place_of_another_on_the_parent_run(name: str, label: str, placed: str) -> None:
    assert execute.place_metric(name, label) == placed


def trains(config: SftConfig, attempt: Attempt) -> Metrics:
    """Train for real."""
    attempt.run_child("training", "train")
    return {}


def plan_training(settings: Settings, **config: Any) -> tuple[Planned, Planned]:
    """Plan the demo's rows and a small policy trained on them."""
    digests = open_digests(settings)
    source, base = (Source(name, DEMO / name, digests.of(DEMO / name)) for name in ("preferences.jsonl", "tiny-policy"))
    rows = ingest(IngestConfig(responses=ResponseRegime.support), {"source": source}, runtime=Runtime())
    planned = Step("trains", 1, trains, "")(SftConfig(**config), {"rows": rows, "base": base}, runtime=Runtime(device=Device.cpu))  # fmt: skip
    return rows, planned


def read_points(settings: Settings, run: Any, name: str) -> list[int]:
    """Return the steps at which MLflow has a metric of a run, each as often as it is there."""
    history = MlflowClient(settings.mlflow_tracking_uri).get_metric_history(run.info.run_id, name)
    return [point.step for point in history]


def test_what_a_failing_training_told_last_is_in_mlflow_too(servers: Settings) -> None:
    rows, planned = plan_training(servers, learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(UserError, match="NaN or infinite in 3 steps in a row"):
        run(servers, "failing", rows, planned)
    failed = read_runs(servers, "failing")["trains"]
    assert failed.info.status == "FAILED"
    (metrics,) = (servers.home / "work" / "trains").glob("*/output/metrics.jsonl")
    told = [line["step"] for line in read_json_lines(metrics)]
    assert read_points(servers, failed, "train/learning_rate") == told == [1, 2, 3]


def test_a_training_that_was_done_and_not_recorded_is_told_again_and_costs_what_it_took(servers: Settings) -> None:
    """The run that its record names has the curves, and the seconds are those of both attempts."""
    store, (rows, planned) = open_store(servers), plan_training(servers)
    make_foreign_record(store, planned)
    with pytest.raises(ValueError, match="another identity has this fingerprint"):
        run(servers, "unrecorded", rows, planned)
    (spent,) = (servers.home / "work" / "trains").glob("*/spent.json")
    first = json.loads(spent.read_text())
    assert first > 1
    store.delete(records.record_name(planned.step.name, planned.fingerprint))
    ended = run(servers, "recorded", rows, planned)
    record = ended.ref(planned).record
    assert first < record.cost["wall_seconds"] < 2 * first
    (metrics,) = (servers.home / "artifacts").glob("*/preflight.json")
    told = [line["step"] for line in read_json_lines(metrics.with_name("metrics.jsonl"))]
    assert read_points(servers, read_runs(servers, "recorded")["trains"], "train/loss") == told
    assert len(told) > 5 and not spent.exists()


def test_a_commit_that_fails_ends_the_run_and_leaves_nothing_that_was_made_of_it(servers: Settings) -> None:
    store, first = open_store(servers), plan("refused", weights)

    def reader(config: Named, attempt: Attempt) -> Metrics:
        return {}

    second = plan("refused", reader, first)
    make_foreign_record(store, first)
    with pytest.raises(ValueError, match="another identity has this fingerprint"):
        run(servers, "refused", first, second)
    assert store.stat(records.record_name("reader", second.fingerprint)) is None
    statuses = {name: run.info.status for name, run in read_runs(servers, "refused").items()}
    assert statuses["parent"] == statuses["weights"] == "FAILED" and "RUNNING" not in statuses.values()


def make_foreign_record(store: Store, planned: Planned) -> None:
    """Write a record of another identity where that of a planned step belongs; its file is nowhere."""
    record = {
        "step": planned.step.name, "version": 1, "fingerprint": planned.fingerprint, "identity": {"step": "other"},
        "inputs": {}, "attempt": "0", "prefix": "nowhere", "files": [{"name": "a", "size": 1, "sha256": "0"}], "summary": {},
        "provenance": {}, "cost": {}, "created": "", "mlflow_run": "", "prefect_run": "",
    }  # fmt: skip
    data = records.dump(records.Record.model_validate(record))
    store.put(records.record_name(planned.step.name, planned.fingerprint), data, create=True)


def test_whoever_stops_a_run_does_not_wait_for_its_upload(servers: Settings) -> None:
    store, first = open_store(servers), plan("stopped", weights_of_a_gigabyte)

    def reader(config: Named, attempt: Attempt) -> Metrics:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(servers, "stopped", first, plan("stopped", reader, first))
    assert store.stat(records.record_name(first.step.name, first.fingerprint)) is None
    assert {run.info.status for run in read_runs(servers, "stopped").values()} == {"KILLED"}
    kept = servers.home / "work" / first.step.name / first.fingerprint
    assert (place_output(kept, home=servers.home) / "weights.bin").stat().st_size == 1 << 30, "a rerun may take it"


def test_a_source_exchanged_between_plan_and_step_is_an_error_and_what_was_made_of_it_is_dropped(
    servers: Settings, tmp_path: Path
) -> None:
    digests, model = open_digests(servers), make_model(tmp_path / "model", b"planned")
    made = []

    def measure(config: Named, attempt: Attempt) -> Metrics:
        made.append((attempt.inputs["model"] / "model.safetensors").read_bytes())
        attempt.check_weights("model", digest_weights(attempt.inputs["model"]))
        (attempt.output / "summary.json").write_text("{}")
        return {}

    planned = plan_on(measure, Source("a folder", model, digests.of(model)))
    make_model(model, b"swapped out")
    with pytest.raises(
        InputChanged, match=r"measure: its input model, a folder at /.*, has digest \w+, expected \w+: it was changed"
    ):
        run(servers, "swapped", planned)
    store = open_store(servers)
    assert store.stat(records.record_name("measure", planned.fingerprint)) is None
    assert not list((servers.home / "work").glob("*/*/")) and not list((servers.home / "artifacts").glob("*"))
    make_model(model, b"planned")
    ended = run(servers, "swapped", planned)
    assert made == [b"swapped out", b"planned"]
    assert ended.ref(planned).record.given["model"].digest == digests.of(model) == planned.inputs["model"].fingerprint


def test_a_folder_exchanged_while_it_was_read_and_put_back_is_seen_by_what_the_child_read(
    servers: Settings, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", b"planned")

    def measure(config: Named, attempt: Attempt) -> Metrics:
        model.rename(tmp_path / "aside")
        read = digest_weights(make_model(model, b"other"))
        (attempt.output / "summary.json").write_text("{}")
        shutil.rmtree(model)
        (tmp_path / "aside").rename(model)
        attempt.check_weights("model", read)
        return {}

    planned = plan_on(measure, Source("a folder", model, open_digests(servers).of(model)))
    with pytest.raises(InputChanged, match=r"weights with digest \w+ were read, expected \w+, which are there now"):
        run(servers, "put back", planned)
    assert open_store(servers).stat(records.record_name("measure", planned.fingerprint)) is None
    assert not list((servers.home / "work").glob("*/*/"))


def test_an_artifact_edited_on_this_machine_is_read_by_no_step(servers: Settings) -> None:
    first = plan("edited", weights)
    run(servers, "edited", first)
    (copy,) = (servers.home / "artifacts").glob("*")
    (copy / "weights.txt").write_text("EDITED")

    def reader(config: Named, attempt: Attempt) -> Metrics:
        return {}

    second = plan("edited", reader, first)
    with pytest.raises(ValueError, match=r"weights/\w+: its copy /.* has digest \w+, expected \w+, that of its record"):
        run(servers, "edited", first, second)
    shutil.rmtree(copy)
    ended = run(servers, "edited", first, second)
    assert (ended.folder(ended.ref(first)) / "weights.txt").read_text() == "edited"


def plan_on(work: Work, model: Source) -> Planned:
    """Plan a step of its own on a model."""
    return Step(work.__name__, 1, work, "")(Named(name=str(model.path)), {"model": model}, runtime=Runtime())


def make_model(folder: Path, data: bytes) -> Path:
    """Write a folder with weights, over what is there."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    return folder


def weights_of_a_gigabyte(config: Named, attempt: Attempt) -> Metrics:
    """Write what takes seconds to upload, and no room on the disk."""
    with (attempt.output / "weights.bin").open("wb") as file:
        file.truncate(1 << 30)
    return {}
