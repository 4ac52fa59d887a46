"""Which model is champion: a pointer in the store, moved by compare-and-swap, its history in it; MLflow mirrors it.

MLflow's aliases have no compare-and-swap, so they cannot hold the truth: of two promotions at once both would succeed.
"""

import json
from datetime import UTC, datetime
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from pydantic import BaseModel, ConfigDict

from infra.store import PreconditionFailed, Store


class Promotion(BaseModel):
    """One move of the pointer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: str  # step/fingerprint of the promoted model
    over: str  # what it was measured against and replaced
    verdict: str  # step/fingerprint of the gate that decided
    source: str  # s3:// folder of the model's files
    mlflow_run: str
    at: str  # ISO 8601, UTC


class Champion(BaseModel):
    """The pointer: the newest promotion last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    history: tuple[Promotion, ...]

    @property
    def current(self) -> Promotion:
        return self.history[-1]


class ChampionMoved(Exception):  # noqa: N818 - an event
    """Another promotion moved the pointer since it was read."""


def pointer_name(model: str) -> str:
    """Return where the pointer of a model lies in the store."""
    return f"models/{model}/champion.json"


def read_champion(store: Store, model: str) -> tuple[Champion, str] | None:
    """Return (champion, etag); None while nothing was promoted."""
    found = store.get(pointer_name(model))
    return (Champion.model_validate_json(found[0]), found[1]) if found else None


def promote(store: Store, *, model: str, ref: str, over: str, verdict: str, source: str, mlflow_run: str) -> Promotion:
    """Make `ref` the champion where `over` is: the current champion's ref, or anything while there is none.

    Doing it again changes nothing. Raises ChampionMoved when the champion is another than the one it was measured against.
    """
    held = read_champion(store, model)
    if held and held[0].current.ref == ref:
        return held[0].current
    if held and held[0].current.ref != over:
        raise ChampionMoved(
            f"champion of {model!r}: got {held[0].current.ref}, expected {over}, which {ref} was measured against; run the "
            "pipeline again with champion=current"
        )
    move = Promotion(
        ref=ref, over=over, verdict=verdict, source=source, mlflow_run=mlflow_run,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    pointer = Champion(history=(*(held[0].history if held else ()), move))
    data = json.dumps(pointer.model_dump(mode="json"), indent=1).encode()
    try:
        store.put(pointer_name(model), data, create=held is None, replace=held[1] if held else None)
    except PreconditionFailed:
        return promote(
            store, model=model, ref=ref, over=over, verdict=verdict, source=source, mlflow_run=mlflow_run
        )  # fmt: skip
    return move


def mirror_alias(tracking_uri: str, *, model: str, champion: Champion, tags: dict[str, Any]) -> str:
    """Let MLflow's registry say what the pointer says: aliases `champion` and `previous`. Returns the champion's version."""
    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        client.get_registered_model(model)
    except MlflowException:
        client.create_registered_model(
            model, description="Policies promoted by varflow's gate; the pointer in S3 decides."
        )
    versions = {version.tags.get("varflow.ref"): version for version in client.search_model_versions(f"name='{model}'")}
    chosen = ""
    for alias, move in zip(("champion", "previous"), reversed(champion.history), strict=False):
        version = versions.get(move.ref)
        if version is None:
            version = client.create_model_version(
                model, source=move.source, run_id=move.mlflow_run,
                tags={"varflow.ref": move.ref, "varflow.verdict": move.verdict} | tags,
                await_creation_for=0,  # nothing is copied, so there is nothing to wait for
            )  # fmt: skip
        client.set_registered_model_alias(model, alias, version.version)
        chosen = chosen or str(version.version)
    return chosen
