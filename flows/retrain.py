"""New preferences have landed: is there enough, is nobody on it, then align; else say why not."""

from typing import Any, cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.align import align
from flows.config import RetrainConfig
from infra import ledger
from infra.fingerprint import fingerprint
from infra.provenance import is_gone
from infra.settings import read_settings
from infra.store import Store, open_store
from tasks.child import StepFailed


@flow(name="retrain", persist_result=False)
def retrain(config: RetrainConfig) -> dict[str, Any]:
    """Train on every batch that landed, when there is news and no other run is on it.

    The ledger is the truth and a trigger only a hint: however often this starts, one snapshot is trained on once.
    """
    store = open_store(read_settings())
    recipe = identify(config)
    batches = ledger.entries(store)
    used = ledger.consumed(store, recipe)
    new = [batch for batch in batches if batch["digest"] not in used]
    new_bytes = sum(batch["bytes"] for batch in new)
    if new_bytes < config.min_new_bytes:
        return decline(f"{len(new)} new batches with {new_bytes} bytes, expected at least {config.min_new_bytes} bytes")
    snapshot = ledger.write_snapshot(store, [batch["digest"] for batch in batches])
    run = str(flow_run.id)
    if held := claim(store, snapshot=snapshot, recipe=recipe, run=run):
        return decline(held)
    try:
        outcome = align(config.recipe.model_copy(update={"preferences": f"batches:{snapshot}"}))
    except (StepFailed, ValueError) as error:  # anything else is no word on these data: whoever comes next takes over
        ledger.settle(store, snapshot=snapshot, recipe=recipe, run=run, state="failed", outcome=str(error)[:2000])
        raise
    ledger.settle(store, snapshot=snapshot, recipe=recipe, run=run, state="done", outcome=outcome["verdict"])
    return {"started": True, "snapshot": snapshot, "batches": len(batches)} | outcome


@flow(name="sweep", persist_result=False)
def sweep(deployment: str = "retrain/retrain") -> dict[str, Any]:
    """Start a retrain for what landed and no event told of. Whether there is enough is the retrain's to say."""
    store = open_store(read_settings())
    claimed = ledger.claimed(store)
    missed = [batch["digest"] for batch in ledger.entries(store) if batch["digest"] not in claimed]
    if not missed:
        return decline("every batch of the ledger is in a snapshot that a run has claimed")
    run = cast(FlowRun, run_deployment(deployment, timeout=0, as_subflow=False))
    return {"started": True, "missed": missed, "run": str(run.id)}


def identify(config: RetrainConfig) -> str:
    """Return the 16 hex digits under which a recipe's retrains are kept: runtime, approval and preferences are no part of it."""
    return fingerprint(config.recipe.model_dump(mode="json", exclude={"runtime", "approval", "preferences"}))[:16]


def claim(store: Store, *, snapshot: str, recipe: str, run: str) -> str:
    """Claim a snapshot; return '' when it is ours, else who has it.

    A claim whose run is over without a word is taken over: cancelled or crashed, says Prefect, or killed, of which Prefect
    hears nothing when no worker minded the run. One that failed or is done stays: the same data would fail, or be trained
    on, again.
    """
    held = ledger.read_claim(store, snapshot, recipe)
    if held is None:
        return (
            "" if ledger.claim(store, snapshot=snapshot, recipe=recipe, run=run) else "another run claimed it just now"
        )
    found, etag = held
    if found["state"] != "running":
        return (
            f"snapshot {snapshot[:12]} was {found['state']} by run {found['run']} at {found['at']}: {found['outcome']}"
        )
    if is_alive(found["run"]) and not is_gone(found["process"]):
        return f"snapshot {snapshot[:12]} is being trained on by run {found['run']} since {found['at']}"
    taken = ledger.claim(store, snapshot=snapshot, recipe=recipe, run=run, over=etag)
    return "" if taken else "another run took the claim over just now"


def is_alive(run: str) -> bool:
    """Tell whether a Prefect flow run may still be working."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(run).state  # type: ignore[arg-type]
        except ObjectNotFound:
            return False
    return state is not None and not state.is_final()


def decline(reason: str) -> dict[str, Any]:
    """Say why nothing is done."""
    get_run_logger().info("nothing to do: %s", reason)
    return {"started": False, "reason": reason}
