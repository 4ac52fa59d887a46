"""A run that is killed, stopped or cancelled leaves no process and loses no finished step; the next one goes on."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient

from infra.settings import Settings
from infra.stack.http import ask
from infra.store import Store
from tasks.artifacts import fetch_artifact
from tests.faults.command import (
    BENCHMARK,
    Command,
    await_child,
    await_no_children,
    find_children,
    finish,
    killed_at_the_end,
    read_records,
    record_of,
    small,
    wait_until,
)
from tests.faults.held_store import HeldStore

LONG = {"train__epochs": 30, "train__learning_rate": 1e-6}  # some 90 steps: time to be stopped in
STAGES = ("ingest", "score_rewards", "score_reference", "train", "generate", "evaluate")


def statuses(settings: Settings, experiment: str) -> dict[str, str]:
    """Return the status of every MLflow run of an experiment, by run id."""
    client = MlflowClient(tracking_uri=settings.mlflow_tracking_uri)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000) if found else []
    return {run.info.run_id: run.info.status for run in runs}


def first_metric_time(store: Store, settings: Settings, outcome: dict[str, Any]) -> float:
    """Return when the first step of the training that an outcome names was taken, in unix seconds."""
    folder = fetch_artifact(store, record_of(store, outcome, "train"), home=settings.home)
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["time"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_in_each_stage_then_finished(varflow: Command, store: Store, stack: Settings) -> None:
    """One pass from nothing to the end, with kill -9 of the flow in every stage on the way."""
    number = random.randrange(
        10_000, 20_000
    )  # means nothing for these rows and prompts, and makes every step a new one
    benchmark = BENCHMARK | {"seed": number}
    fresh = small(name="killed", ingest__max_row_chars=number, suite__benchmarks=[benchmark], **LONG)
    kept = read_records(store)
    for stage in STAGES:
        with killed_at_the_end(varflow.start("run", "smoke", *fresh)) as flow:
            await_child(flow, stack.home, stage, metric_lines=3 if stage == "train" else 0)
            flow.kill()
            flow.communicate()
        await_no_children(stack.home)
        now = read_records(store)
        assert {name: now[name] for name in kept} == kept, f"the kill in {stage} cost a record"
        assert not any(name.startswith(f"{stage}/") for name in now.keys() - kept.keys())
        kept = now
    outcome = varflow.ask("run", "smoke", *fresh)
    now = read_records(store)
    assert {name: now[name] for name in kept} == kept
    assert all(step["cached"] == (f"{step['step']}/{step['fingerprint']}" in kept) for step in outcome["steps"])
    states = list(statuses(stack, "killed").values())
    assert "RUNNING" not in states and states.count("KILLED") >= 2 * len(STAGES)  # each kill: the run and its step


@pytest.mark.slow
@pytest.mark.parametrize("pass_request", [False, True], ids=["before the record", "after the record"])
def test_killed_between_upload_and_the_record_known(
    varflow: Command, store: Store, stack: Settings, done: dict[str, Any], pass_request: bool
) -> None:
    """The files are up, and the record is on its way, or written with its answer lost: either way one record is left."""
    words = small(name="upload", train__seed=2000 + pass_request)
    assert stack.s3_endpoint
    held = f"PUT /{stack.s3_bucket}/records/train/".encode()
    with (
        HeldStore(stack.s3_endpoint, held=held, pass_request=pass_request) as proxy,
        killed_at_the_end(varflow.start("run", "smoke", *words, VARFLOW_S3_ENDPOINT=proxy.endpoint)) as flow,
    ):
        wait_until("the record's request", lambda: proxy.reached.is_set() or flow.poll() is not None)
        assert flow.poll() is None, finish(flow).stderr
        flow.kill()
        flow.communicate()
    before = read_records(store)
    outcome = varflow.ask("run", "smoke", *words)
    trained = record_of(store, outcome, "train")
    name = f"train/{trained.fingerprint}"
    assert (name in before) == pass_request
    assert before.get(name, (trained.attempt, trained.created)) == (trained.attempt, trained.created)
    assert all(step["cached"] == (f"{step['step']}/{step['fingerprint']}" in before) for step in outcome["steps"])
    assert "RUNNING" not in statuses(stack, "upload").values()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_lets_the_training_save_and_the_next_run_go_on(
    varflow: Command, store: Store, stack: Settings, done: dict[str, Any], number: signal.Signals, status: int
) -> None:
    words = small(name="signals", train__seed=int(number), **LONG)
    with killed_at_the_end(varflow.start("run", "smoke", *words)) as flow:
        child = await_child(flow, stack.home, "train", metric_lines=3)
        log = Path(child.cmdline()[-2]).parent / "log.txt"
        flow.send_signal(number)
        ended = finish(flow)
    assert find_children(stack.home) == []
    assert ended.returncode == status
    assert ended.stdout == "" and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"varflow: stopped by {number.name}")
    assert ended.stderr.count("varflow: ") == 1
    assert "stopped on request" in log.read_text()
    assert list(statuses(stack, "signals").values()).count("RUNNING") == 0
    stopped_at = log.stat().st_mtime
    outcome = varflow.ask("run", "smoke", *words)
    assert first_metric_time(store, stack, outcome) < stopped_at, "its first steps are those of the stopped run"


@pytest.mark.slow
def test_cancelled_from_the_api_and_taken_up_by_a_later_run(
    varflow: Command, store: Store, stack: Settings, deployed: None, done: dict[str, Any]
) -> None:
    words = small(name="cancelled", train__seed=3, **LONG)
    started = varflow.ask("run", "smoke", "--on", "worker", *words)
    api = f"{stack.prefect_api_url}/flow_runs/{started['run']}"

    def training() -> float | None:
        assert ask(api)["state_type"] not in ("FAILED", "CRASHED", "COMPLETED"), ask(api)["state"]
        for child in find_children(stack.home, "train"):
            metrics = Path(child.cmdline()[-2]).parent / "output" / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 3:
                return metrics.stat().st_mtime
        return None

    seen_at = wait_until("training on the worker", training)
    ask(f"{api}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    wait_until("the state Cancelled", lambda: ask(api)["state_type"] == "CANCELLED")
    await_no_children(stack.home)
    wait_until("MLflow's KILLED", lambda: set(statuses(stack, "cancelled").values()) <= {"FINISHED", "KILLED"})
    assert list(statuses(stack, "cancelled").values()).count("KILLED") == 2, "the run and its training"
    outcome = varflow.ask("run", "smoke", *words)
    assert first_metric_time(store, stack, outcome) < seen_at


def test_cancelled_from_the_api_in_the_callers_own_process(
    varflow: Command, store: Store, stack: Settings, done: dict[str, Any]
) -> None:
    """No worker watches such a run; it watches itself, lets the child save, and says that it was cancelled."""
    words = small(name="cancelled_here", train__seed=4, **LONG)
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    with killed_at_the_end(varflow.start("run", "smoke", *words)) as flow:
        await_child(flow, stack.home, "train", metric_lines=3)
        (run,) = ask(f"{stack.prefect_api_url}/flow_runs/filter", running)
        api = f"{stack.prefect_api_url}/flow_runs/{run['id']}"
        ask(f"{api}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
        ended = finish(flow)
    assert ended.returncode == 143, ended.stderr
    assert find_children(stack.home) == []
    assert ask(api)["state_type"] == "CANCELLED"
    assert list(statuses(stack, "cancelled_here").values()).count("KILLED") == 2, "the run and its training"
    outcome = varflow.ask("run", "smoke", *words)
    assert outcome["steps"][-1]["step"] == "report"
