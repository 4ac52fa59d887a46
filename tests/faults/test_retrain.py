"""New preferences start one retrain, however often they are told of; what was killed is taken over, what failed is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.config import RetrainConfig
from flows.overrides import override
from flows.recipes import smoke
from infra import ledger
from infra.settings import Settings
from infra.store import Store, open_store
from tests.faults.command import (
    Command,
    await_child,
    await_no_children,
    finish,
    killed_at_the_end,
    small,
    wait_until,
)
from tests.faults.deployment import RUN, Deployment, run_python

EMIT = "from prefect.events import emit_event; emit_event('preferences.landed', resource={'prefect.resource.id': 'prefs.%s'})"


def write_batch(path: Path, *, rows: int = 24, about: str = "bread") -> Path:
    """Write preferences as a user would push them."""
    lines = [
        {"prompt": f"What of {about}, take {n}?", "chosen": f"Take {n} of it.", "rejected": f"No {about} is {n}."}
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def claims(store: Store) -> list[dict[str, Any]]:
    """Return every claim of a store."""
    found = (store.get(item.name) for item in store.scan("retrains"))
    return [json.loads(item[0]) for item in found if item]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_batch_told_of_six_times_is_one_retrain_and_the_sweep_finds_the_untold(
    varflow: Command, store: Store, stack: Settings, deployed: None, done: dict[str, Any], tmp_path: Path
) -> None:
    recipe = override(smoke().model_copy(update={"name": "landed", "champion": "current"}), small()[1::2])
    config = RetrainConfig(recipe=recipe).model_dump(mode="json")
    retrain, sweep = Deployment(stack, "retrain/retrain"), Deployment(stack, "sweep/sweep")
    retrain.set_parameters({"config": config})

    batch = write_batch(tmp_path / "bread.jsonl")
    pushed = [varflow.ask("push", str(batch))["pushed"][0] for _ in range(5)]
    assert [item["new"] for item in pushed] == [True, False, False, False, False]
    run_python(varflow, EMIT % pushed[0]["digest"])
    run_python(varflow, RUN % retrain.name)
    run_python(varflow, RUN % retrain.name)
    runs = wait_until("the event's retrain", lambda: len(retrain.runs()) >= 3 and retrain.ended())
    assert {run.state_type for run in runs} == {"COMPLETED"}
    (claim,) = claims(store)
    assert claim["state"] == "done" and claim["outcome"] in {"PROMOTE", "HOLD", "REJECT"}
    assert ledger.consumed(store, claim["recipe"]) == {pushed[0]["digest"]}
    declined = [run for run in runs if str(run.id) != claim["run"]]
    assert len(declined) == len(runs) - 1
    wait_until("the others' reasons", lambda: all("nothing to do: " in retrain.said(run) for run in declined))

    retrain.set_parameters({"config": config | {"min_new_bytes": 10**9}})
    untold, _ = ledger.receive(store, write_batch(tmp_path / "tea.jsonl", about="tea"))
    before = {run.id for run in retrain.runs()}
    run_python(varflow, RUN % sweep.name)
    runs = wait_until("the sweep's retrain", lambda: [r for r in retrain.ended() if r.id not in before])
    wait_until("its reason", lambda: any("1 new batches with" in retrain.said(run) for run in runs))
    assert untold not in ledger.claimed(store), "a run that declines claims nothing"


def test_a_retrain_that_failed_is_not_repeated_for_the_same_batches(
    elsewhere: Command, stack: Settings, tmp_path: Path
) -> None:
    words = small(below="recipe.", name=elsewhere.settings.s3_prefix)
    again = elsewhere.ask("retrain", "smoke", *words)
    assert again["started"] is False and again["reason"].startswith("0 new batches with 0 bytes, expected at least 1")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n' * 8)
    ledger.receive(open_store(elsewhere.settings), tmp_path / "broken.jsonl")
    told = elsewhere.refuse("retrain", "smoke", *words)
    assert "8 of 8 rows are unusable" in told
    (claim,) = claims(open_store(elsewhere.settings))
    assert claim["state"] == "failed" and claim["outcome"] in told
    again = elsewhere.ask("retrain", "smoke", *words)
    assert again["started"] is False and f"was failed by run {claim['run']}" in again["reason"]


def test_a_retrain_that_met_trouble_with_a_server_is_tried_again(
    elsewhere: Command, done: dict[str, Any], tmp_path: Path
) -> None:
    """The experiment `smoke` has its artifacts elsewhere, so MLflow and the store do not go together: no fault of the data."""
    words = small(below="recipe.", name="smoke")
    ledger.receive(open_store(elsewhere.settings), write_batch(tmp_path / "bread.jsonl"))
    for _ in range(2):
        assert "its artifacts lie at" in elsewhere.refuse("retrain", "smoke", *words)
    (claim,) = claims(open_store(elsewhere.settings))
    assert claim["state"] == "running", "nobody's any more: its run is over"


@pytest.mark.slow
def test_a_retrain_that_was_killed_is_taken_over_by_the_next(
    elsewhere: Command, stack: Settings, tmp_path: Path
) -> None:
    words = small(below="recipe.", name=elsewhere.settings.s3_prefix)
    store = open_store(elsewhere.settings)
    ledger.receive(store, write_batch(tmp_path / "bread.jsonl"))
    with killed_at_the_end(elsewhere.start("retrain", "smoke", *words)) as flow:
        await_child(flow, elsewhere.settings.home, "score_rewards")
        (killed,) = claims(store)
        again = elsewhere.ask("retrain", "smoke", *words)
        assert again["started"] is False and f"is being trained on by run {killed['run']}" in again["reason"]
        flow.kill()
        flow.communicate()
    await_no_children(elsewhere.settings.home)
    assert killed["state"] == "running"
    with killed_at_the_end(elsewhere.start("retrain", "smoke", *words)) as flow:
        await_child(flow, elsewhere.settings.home, "score_rewards")
        (claim,) = claims(store)
        flow.terminate()
        assert finish(flow).returncode == 143
    assert (claim["state"], claim["snapshot"]) == ("running", killed["snapshot"]) and claim["run"] != killed["run"]
