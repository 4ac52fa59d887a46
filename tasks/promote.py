"""Promotion: an effect, not an artifact. The champion's history in the store grows; MLflow's aliases follow it."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from infra import registry
from infra.registry import ChampionMoved, VerdictUsed
from infra.tracking import TrackingError
from tasks.candidate import check_evaluated, make_candidate
from tasks.execute import Execution
from tasks.step import ArtifactRef


def promote(
    execution: Execution, *, model: str, challenger: ArtifactRef, verdict: ArtifactRef, refused: str = ""
) -> str:
    """Make the challenger champion when the verdict says PROMOTE; return one sentence on what happened.

    Any other verdict is kept in the history as a look at this challenger, and one that a person refused as that, with their words
    (`refused`). Doing it again changes nothing.
    """
    store = execution.store

    @task(name="promote", task_run_name="promote", persist_result=False, cache_policy=NO_CACHE)
    def move(challenger_name: str, decision: str) -> str:
        candidate = make_candidate(
            store, challenger.record, verdict=verdict.record, by=f"Prefect run {execution.prefect_run}"
        )
        if refused:
            registry.refuse(store, model, candidate.model_copy(update={"reason": refused}))
            said = f"{decision}, and {refused}: the champion of {model!r} stays"
        elif decision != "PROMOTE":
            registry.measure(store, model, candidate)
            said = f"{decision}: the champion of {model!r} stays"
        else:
            check_evaluated(store, challenger.record, verdict=verdict.record)
            if challenger.cached and not registry.is_champion(store, model, candidate):
                # what this very run uploaded, the store checked by its own sums a moment ago; an older artifact may have been changed
                store.check_files(challenger.record.prefix, challenger.record.files)
            try:
                registry.promote(store, model, candidate)
                said = f"PROMOTE: {challenger_name[:24]}… is champion of {model!r}"
            except (ChampionMoved, VerdictUsed) as gone:
                said = f"not promoted: {gone}"
                registry.measure(store, model, candidate.model_copy(update={"reason": said}))
        try:
            versions = registry.mirror(store, model, tracking_uri=execution.tracking.uri)
        except TrackingError as error:
            return f"{said}; MLflow's aliases follow with the next call: {error}"
        shown = ", ".join(f"{alias} version {version}" for alias, version in versions.items())
        return f"{said} (MLflow: {shown})"

    said = move(challenger.name, str(verdict.record.summary["verdict"]))
    get_run_logger().info(said)
    return said
