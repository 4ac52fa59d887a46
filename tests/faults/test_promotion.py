"""Promotions that are killed halfway: the same command again finishes them, and nothing is done twice."""

from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient

from infra import registry
from infra.settings import Settings
from infra.store import Store
from tests.faults.command import Command, finish, killed_at_the_end, wait_until
from tests.faults.held_store import HeldStore

MODEL = "killed-policy"


@pytest.fixture
def trained(done: dict[str, Any]) -> str:
    """Give the reference of the model that the small recipe trained."""
    return next(f"train/{step['fingerprint']}" for step in done["steps"] if step["step"] == "train")


def aliases(stack: Settings, model: str) -> dict[str, str]:
    """Return what MLflow's registry says, by alias."""
    client = MlflowClient(tracking_uri=stack.mlflow_tracking_uri)
    held = client.get_registered_model(model).aliases
    return {alias: client.get_model_version(model, version).tags["varflow.ref"] for alias, version in held.items()}


def kill_at(varflow: Command, proxy: HeldStore, *words: str, **variables: str) -> None:
    """Start the command and kill it with -9 as soon as the held request is on its way."""
    with killed_at_the_end(varflow.start(*words, **variables)) as command:
        wait_until("the held request", lambda: proxy.reached.is_set() or command.poll() is not None)
        assert command.poll() is None, finish(command).stderr
        command.kill()
        command.communicate()


@pytest.mark.parametrize("pass_request", [False, True], ids=["lost", "its answer lost"])
def test_killed_at_the_pointer_after_the_history(
    varflow: Command, store: Store, stack: Settings, trained: str, pass_request: bool
) -> None:
    model = f"{MODEL}-{int(pass_request)}"
    words = ("promote", trained, "--model", model, "--without-gate", "a test")
    assert stack.s3_endpoint
    held = f"PUT /{stack.s3_bucket}/models/{model}/champion.json".encode()
    with HeldStore(stack.s3_endpoint, held=held, pass_request=pass_request) as proxy:
        kill_at(varflow, proxy, *words, VARFLOW_S3_ENDPOINT=proxy.endpoint)
    assert [entry.ref for entry in registry.read_history(store, model)] == [trained]
    assert (store.get(registry.pointer_name(model)) is not None) == pass_request
    told = varflow.ask(*words)
    assert told["champion"]["ref"] == trained and told["moved"] is False and told["mlflow"] == "mirrored"
    assert store.get(registry.pointer_name(model)) is not None
    assert len(varflow.ask("history", "--model", model)["history"]) == 1
    assert aliases(stack, model) == {"champion": trained}


def test_killed_at_the_alias_after_the_pointer(varflow: Command, store: Store, stack: Settings, trained: str) -> None:
    model = f"{MODEL}-alias"
    words = ("promote", trained, "--model", model, "--without-gate", "a test")
    held = b"POST /api/2.0/mlflow/registered-models/alias"
    with HeldStore(stack.mlflow_tracking_uri, held=held, pass_request=False) as proxy:
        kill_at(varflow, proxy, *words, VARFLOW_MLFLOW_TRACKING_URI=proxy.endpoint)
    champion = registry.read_standing(store, model).champion
    assert champion and champion.ref == trained
    assert aliases(stack, model) == {}
    assert varflow.ask(*words)["moved"] is False
    assert aliases(stack, model) == {"champion": trained}


def test_a_registry_that_is_away_costs_the_mirror_alone(
    varflow: Command, store: Store, stack: Settings, trained: str, done: dict[str, Any]
) -> None:
    model = f"{MODEL}-away"
    words = ("promote", trained, "--model", model, "--without-gate", "a test")
    told = varflow.ask(*words, VARFLOW_MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert told["moved"] is True and "127.0.0.1:9" in told["mlflow"]
    assert varflow.ask("history", "--model", model)["champion"]["ref"] == trained
    told = varflow.refuse("rollback", "--model", model)
    assert "is the first one" in told
    assert varflow.ask(*words)["mlflow"] == "mirrored"
    assert aliases(stack, model) == {"champion": trained}
    assert "expected one of" in varflow.refuse("rollback"), "several models have a history"
