"""Promotion: an effect, not an artifact. The pointer in the store moves; MLflow's alias follows it."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from infra import registry
from tasks.execute import Execution
from tasks.step import ArtifactRef


def promote(execution: Execution, *, model: str, challenger: ArtifactRef, over: str, verdict: ArtifactRef) -> str:
    """Make the challenger champion when the verdict says PROMOTE; return one sentence on what happened.

    `over` is the reference of the champion it was measured against. Doing it again changes nothing.
    """

    @task(name="promote", task_run_name="promote", persist_result=False, cache_policy=NO_CACHE)
    def move(challenger_name: str, decision: str) -> str:
        if decision != "PROMOTE":
            return f"{decision}: the champion of {model!r} stays"
        store = execution.store
        try:
            registry.promote(
                store,
                model=model,
                ref=challenger_name,
                over=over,
                verdict=verdict.name,
                source=store.url(challenger.record.prefix),
                mlflow_run=challenger.record.mlflow_run,
            )
        except registry.ChampionMoved as moved:
            return f"not promoted: {moved}"
        held = registry.read_champion(store, model)
        assert held
        version = registry.mirror_alias(
            execution.tracking.uri, model=model, champion=held[0], tags={"varflow.decision": decision}
        )
        return f"PROMOTE: {challenger_name[:24]}… is champion of {model!r}, version {version} in MLflow"

    said = move(challenger.name, str(verdict.record.summary["verdict"]))
    get_run_logger().info(said)
    return said
