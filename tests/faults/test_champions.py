"""Champions in whole runs: a race that is lost while a person reads the report, a no, and the nightly evaluation."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError

from flows.deployments import table
from infra import records, registry
from infra.registry import Move
from infra.settings import Settings
from infra.store import Store
from tests.faults.command import (
    BENCHMARK,
    Command,
    finish,
    killed_at_the_end,
    prefect_at,
    read_records,
    record_of,
    small,
    wait_until,
)
from tests.faults.deployment import RUN, Deployment, run_python

EASY = {"gate__alpha": 0.49, "gate__max_length_growth": None, "gate__margins": {"mmlu_part": 0.99}}
SEEDS = (31, 32)


def train_ref(outcome: dict[str, Any]) -> str:
    """Return the model that a run trained."""
    return next(f"train/{step['fingerprint']}" for step in outcome["steps"] if step["step"] == "train")


@pytest.fixture(scope="module")
def promotable(varflow: Command, store: Store, done: dict[str, Any]) -> tuple[str, str, Callable[..., list[str]]]:
    """Train two models far from each other; give the one with the lower held-out reward, the other one, and the words of a run whose gate
    says PROMOTE for the other one over it."""
    changes = {seed: {"train__learning_rate": 0.05, "train__seed": seed} for seed in SEEDS}
    told = {seed: varflow.ask("run", "smoke", *small(**changes[seed])) for seed in SEEDS}
    gains = {
        seed: record_of(store, told[seed], "gate").summary["metrics"]["gate/heldout_reward_gain"] for seed in SEEDS
    }
    worse, better = sorted(SEEDS, key=gains.__getitem__)
    assert gains[worse] < gains[better]
    champion = train_ref(told[worse])

    def words(**more: Any) -> list[str]:
        return small(**changes[better], champion=champion, **EASY, **more)

    return champion, train_ref(told[better]), words


def await_question(process: "subprocess.Popen[str]", settings: Settings) -> FlowRun:
    """Return the run that waits for a person, as soon as it has its form."""

    def look() -> FlowRun | None:
        assert process.poll() is None, finish(process).stderr
        with prefect_at(settings), get_client(sync_client=True) as client:
            paused = [run for run in client.read_flow_runs() if run.state and run.state.is_paused()]
            for run in paused:
                assert run.state and run.state.state_details.run_input_keyset
                try:
                    client.read_flow_run_input(run.id, run.state.state_details.run_input_keyset["schema"])
                except PrefectHTTPStatusError:  # the state is there a moment before its form
                    return None
                return run
        return None

    found: FlowRun = wait_until("the run to ask", look)
    return found


def answer(run: FlowRun, settings: Settings, *, promote: bool, note: str) -> None:
    """Resume a run as its page does."""
    with prefect_at(settings), get_client(sync_client=True) as client:
        client.resume_flow_run(run.id, run_input={"promote": promote, "note": note})


def end(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return what a run says as JSON."""
    ended = finish(process)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.slow
def test_a_no_leaves_the_champion_and_an_entry_and_its_verdict_promotes_nothing_any_more(
    varflow: Command, store: Store, stack: Settings, promotable: tuple[str, str, Callable[..., list[str]]]
) -> None:
    champion, challenger, words = promotable
    name = "refused-policy"
    varflow.ask("promote", champion, "--model", name, "--without-gate", "the first")
    run = ("run", "smoke", "--json", *words(model_name=name, approval=True))
    with killed_at_the_end(varflow.start(*run)) as process:
        answer(await_question(process, stack), stack, promote=False, note="odd samples")
        told = end(process)
    assert told["verdict"] == "PROMOTE"
    assert told["promotion"].startswith(f"PROMOTE, and not approved: odd samples: the champion of {name!r} stays")
    history = registry.read_history(store, name)
    assert [(entry.move, entry.ref) for entry in history] == [(Move.promoted, champion), (Move.refused, challenger)]
    verdict = record_of(store, told, "gate")
    assert (history[1].verdict, history[1].decision) == (f"gate/{verdict.fingerprint}", "PROMOTE")
    assert history[1].reason == "not approved: odd samples"
    said = varflow.refuse("promote", challenger, "--model", name)
    assert "was refused by a person (entry 2" in said and "not approved: odd samples" in said
    again = varflow.ask(*run[:2], *run[3:])  # asks nobody, else it would wait for ever
    assert again["promotion"].startswith("not promoted: ") and "was refused by a person" in again["promotion"]
    assert registry.read_history(store, name) == history
    standing = registry.read_standing(store, name)
    assert standing.champion and standing.champion.ref == champion


@pytest.mark.slow
def test_a_run_whose_champion_moved_before_its_promotion_is_kept_as_measured(
    varflow: Command,
    store: Store,
    stack: Settings,
    done: dict[str, Any],
    promotable: tuple[str, str, Callable[..., list[str]]],
) -> None:
    champion, challenger, words = promotable
    name = "raced-policy"
    varflow.ask("promote", champion, "--model", name, "--without-gate", "the first")
    with killed_at_the_end(varflow.start("run", "smoke", "--json", *words(model_name=name, approval=True))) as process:
        asked = await_question(process, stack)
        varflow.ask("promote", train_ref(done), "--model", name, "--without-gate", "came first")
        answer(asked, stack, promote=True, note="read it")
        told = end(process)
    assert told["verdict"] == "PROMOTE" and told["promotion"].startswith(f"not promoted: champion of {name!r}: got ")
    assert [(entry.move, entry.ref) for entry in registry.read_history(store, name)] == [
        (Move.promoted, champion),
        (Move.promoted, train_ref(done)),
        (Move.measured, challenger),
    ]
    standing = registry.read_standing(store, name)
    assert standing.champion and standing.champion.ref == train_ref(done)
    assert standing.challenger and standing.challenger.reason.startswith("not promoted: ")


@pytest.mark.slow
def test_the_nightly_evaluation_needs_a_champion_and_computes_once(
    varflow: Command, store: Store, stack: Settings, deployed: None, done: dict[str, Any]
) -> None:
    """The deployment as it is, on fewer items."""
    nightly = Deployment(stack, "benchmark/nightly")
    config = next(entry for entry in table() if entry.name == nightly.name).parameters["config"]
    assert config["model"] == "champion:demo-policy"
    nightly.set_parameters({"config": config | {"suite": {"benchmarks": [BENCHMARK | {"limit": 3}]}}})

    def run_once() -> FlowRun:
        before = {run.id for run in nightly.runs()}
        run_python(varflow, RUN % nightly.name)
        (ended,) = wait_until("the nightly run", lambda: [run for run in nightly.ended() if run.id not in before])
        return ended

    failed = run_once()
    assert failed.state and failed.state.is_failed() and failed.state.message
    assert "nothing was promoted to champion of 'demo-policy' yet" in failed.state.message
    assert "varflow promote REF --model demo-policy" in failed.state.message
    model = train_ref(done)
    varflow.ask("promote", model, "--model", "demo-policy", "--without-gate", "a test")
    before = read_records(store)
    assert run_once().state_type == "COMPLETED"
    (made,) = (name for name in read_records(store).keys() - before.keys() if name.startswith("evaluate/"))
    assert f"train/{records.resolve(store, made).inputs['model']}" == model
    before = read_records(store)
    again = run_once()
    assert again.state_type == "COMPLETED" and read_records(store) == before
    with prefect_at(stack), get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[again.id])))
    assert tasks and {task.state_name for task in tasks} == {"Cached"}
