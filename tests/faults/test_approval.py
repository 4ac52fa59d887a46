"""A promotion that waits for a person, on a real Prefect server."""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import PrefectHTTPStatusError

from flows.approval import ask_approval, describe_refusal
from infra.settings import Settings
from tests.faults.command import Command, prefect_at, small, wait_until

REPORT = "http://127.0.0.1:5000/#/experiments/1/runs/2/artifacts/report.html"


@flow(name="approval-test", persist_result=False)
def waits() -> dict[str, Any]:
    """Ask, and say what came of it, as align does."""
    approval = ask_approval(
        model="policy",
        reasons=["mmlu: not worse"],
        flags=["mmlu, champion: chance"],
        report=REPORT,
        page="http://prefect/run",
    )
    return {"promote": approval.promote, "said": describe_refusal(approval)}


@contextmanager
def paused(outcome: dict[str, Any]) -> Iterator[tuple[SyncPrefectClient, FlowRun]]:
    """Run the flow beside, wait until it pauses, and for its end after the block."""
    here = contextvars.copy_context()  # with the settings that name the server
    thread = threading.Thread(target=here.run, args=(lambda: outcome.update(waits()),), daemon=True)
    with get_client(sync_client=True) as client:
        thread.start()

        def look() -> FlowRun | None:
            runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["approval-test"])))
            return next((run for run in runs if run.state and run.state.is_paused()), None)

        yield client, wait_until("the run to pause", look)
        thread.join(timeout=120)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"promote": True, "note": "read it"}, True),
        ({"promote": False, "note": "odd samples"}, False),
    ],
)
def test_the_run_pauses_with_the_report_linked_and_goes_by_the_answer(
    stack: Settings, answer: dict[str, Any], expected: bool
) -> None:
    outcome: dict[str, Any] = {}
    with prefect_at(stack), paused(outcome) as (client, run):
        assert run.state is not None
        keys = run.state.state_details.run_input_keyset
        assert keys is not None

        def read(key: str) -> str:
            def look() -> str | None:
                try:
                    return client.read_flow_run_input(run.id, keys[key])
                except PrefectHTTPStatusError:  # the state is there a moment before its form
                    return None

            return str(wait_until(f"the {key} of what is asked", look))

        asked = read("description")
        assert REPORT in asked and "- mmlu: not worse" in asked and "- mmlu, champion: chance" in asked
        schema = read("schema")
        assert '"promote"' in schema and '"note"' in schema and "becomes champion" in schema
        client.resume_flow_run(run.id, run_input=answer)
    assert outcome["promote"] is expected
    assert outcome["said"] == f"not approved: {answer['note']}"


def test_a_verdict_that_promotes_nothing_asks_nobody(varflow: Command, done: dict[str, Any]) -> None:
    again = varflow.ask("run", "smoke", *small(approval=True))
    assert again["verdict"] == done["verdict"] != "PROMOTE"
    assert all(step["cached"] for step in again["steps"])
