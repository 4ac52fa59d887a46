"""Which model is champion: an append-only history in the store decides, a pointer says where it stands, MLflow mirrors it.

An entry of the history is put under the next number where none was, so of two moves at once one gets the number and the
other decides again. The pointer follows by compare-and-swap, MLflow's aliases follow the pointer: they have no
compare-and-swap and cannot hold the truth. Whatever a killed call left undone, the next one finishes.
"""

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from enum import StrEnum

from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.store import PreconditionFailed, Store
from infra.tracking import TrackingError

RACES = 50  # lost in a row before somebody has to look
READERS = 8
ALIASES = ("champion", "previous", "challenger")


class Move(StrEnum):
    """What an entry of the history says happened."""

    measured = "measured"  # a gate looked at a challenger, and the champion stayed
    refused = "refused"  # the gate said PROMOTE and a person said no, so the champion stayed
    promoted = "promoted"
    rolled_back = "rolled_back"


class Candidate(BaseModel):
    """A model that may become champion, or was measured: which artifact, of which bytes, and on whose word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ref: str  # step/fingerprint
    digest: str  # of its files, names and bytes
    over: str  # fingerprint of what it was measured against; of the champion it replaces where no gate decided
    verdict: str = ""  # step/fingerprint of the gate's artifact; empty where no gate decided
    decision: str = ""  # PROMOTE, HOLD or REJECT
    reason: str = ""  # given by hand, and why nothing was promoted
    source: str  # s3:// folder of its files
    mlflow_run: str
    by: str  # who asked: a Prefect run, or user@host

    @property
    def fingerprint(self) -> str:
        return self.ref.rpartition("/")[2]


class Entry(Candidate):
    """One line of the history. Entries are never changed and never deleted."""

    number: int  # from 1, without gaps
    move: Move
    at: str  # ISO 8601, UTC
    previous: int | None = None  # of a promotion: the entry that made the champion before it
    restores: int | None = None  # of a rollback: the promotion whose model is champion again
    token: str  # hex; tells its writer, whose answer may have been lost, from others


class Standing(BaseModel):
    """The pointer: what the history comes to after `number` entries. All entries in it are promotions, but `challenger`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = 0
    champion: Entry | None = None
    previous: Entry | None = None
    challenger: Entry | None = None  # measured last, and not promoted
    mirrored: int = 0  # the entry up to which MLflow's aliases say the same


class ChampionMoved(Exception):  # noqa: N818 - an event
    """The champion is another than the one a model was measured against."""


class VerdictUsed(Exception):  # noqa: N818 - a state
    """The verdict made this model champion before, and somebody or something ended that; or a person refused it."""


def pointer_name(model: str) -> str:
    """Return where the pointer of a model lies in the store."""
    return f"models/{model}/champion.json"


def read_standing(store: Store, model: str) -> Standing:
    """Return who is champion, entries included that the pointer does not know of yet. Writes nothing."""
    return _read(store, model)[0]


def is_champion(store: Store, model: str, candidate: Candidate) -> bool:
    """Tell whether these very bytes are champion already."""
    return _holds(read_standing(store, model).champion, candidate)


def list_models(store: Store) -> list[str]:
    """Return the names of the models that have a history."""
    return sorted({item.name.split("/")[1] for item in store.scan("models") if "/history/" in item.name})


def read_history(store: Store, model: str) -> list[Entry]:
    """Return every entry, oldest first."""
    names = [item.name for item in store.scan(f"models/{model}/history")]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(store.get, names))
    return [Entry.model_validate_json(item[0]) for item in found if item]


def measure(store: Store, model: str, candidate: Candidate) -> Standing:
    """Keep that a gate looked at a model and the champion stayed. One verdict is kept once."""

    def decide(standing: Standing) -> Entry | None:
        known = (entry.verdict for entry in (standing.challenger, standing.champion) if entry)
        if candidate.verdict in known or any(e.verdict == candidate.verdict for e in read_history(store, model)):
            return None
        return _entry(candidate, Move.measured, standing)

    return _append(store, model, decide)


def refuse(store: Store, model: str, candidate: Candidate) -> Standing:
    """Keep that a person wants no promotion by this verdict, and why, as the candidate's `reason`: from now on it promotes nothing."""

    def decide(standing: Standing) -> Entry | None:
        if find_refusal(read_history(store, model), verdict=candidate.verdict):
            return None
        return _entry(candidate, Move.refused, standing)

    return _append(store, model, decide)


def find_refusal(history: list[Entry], *, verdict: str) -> Entry | None:
    """Return the entry by which a person refused a verdict, `step/fingerprint`; None where nobody did."""
    return next((entry for entry in history if entry.move is Move.refused and entry.verdict == verdict), None)


def promote(store: Store, model: str, candidate: Candidate) -> Standing:
    """Make a model champion where the one it was measured against is, or where there is none. Again, it changes nothing.

    Raises ChampionMoved when the champion is another by now, VerdictUsed for a verdict that a person refused or that promoted
    the model once already: a schedule must not bring back what was rolled back.
    """

    def decide(standing: Standing) -> Entry | None:
        champion = standing.champion
        if _holds(champion, candidate):
            return None
        if champion and champion.fingerprint != candidate.over:
            raise ChampionMoved(
                f"champion of {model!r}: got {champion.ref} (entry {champion.number}, {champion.at}), expected "
                f"{candidate.over[:16]}…, which {candidate.ref} was measured against; run the pipeline again with "
                "champion=current, or see `varflow history`"
            )
        assert candidate.verdict or candidate.reason, f"{candidate.ref}: neither a verdict nor a reason promotes it"
        if candidate.verdict:
            _check_unused(candidate, read_history(store, model), model=model)
        previous = champion.number if champion else None
        return _entry(candidate, Move.promoted, standing, previous=previous)

    return _append(store, model, decide)


def roll_back(store: Store, model: str, *, to: int | None, reason: str, by: str) -> tuple[Standing, bool]:
    """Make the champion before this one, or that of entry `to`, champion again; return (standing, whether it moved now).

    A call without `to` that finds the rollback of a killed one unfinished, finishes that and goes no further back.
    Raises ValueError where there is nothing to go back to.
    """
    pointer = _read_pointer(store, model)[0]
    standing = read_standing(store, model)
    begun = standing.number > min(pointer.number, pointer.mirrored)
    if to is None and begun and read_entry(store, model, standing.number).move is Move.rolled_back:
        return _append(store, model, lambda _: None), False
    moved = False

    def decide(standing: Standing) -> Entry | None:
        nonlocal moved
        target = _find_target(store, model, standing, to=to)
        if standing.champion and target.number == standing.champion.number:
            return None
        moved = True
        same = target.model_dump(include=set(Candidate.model_fields))
        over = standing.champion.fingerprint if standing.champion else ""
        back = Candidate.model_validate(same | {"over": over, "reason": reason, "by": by})
        return _entry(back, Move.rolled_back, standing, restores=target.number)

    return _append(store, model, decide), moved


def read_entry(store: Store, model: str, number: int) -> Entry:
    """Return an entry of the history. Raises ValueError where there is none."""
    found = _get_entry(store, model, number)
    if found is None:
        raise ValueError(f"history of {model!r}: got entry {number}, expected one that `varflow history` lists")
    return found


def mirror(store: Store, model: str, *, tracking_uri: str) -> dict[str, str]:
    """Let MLflow's registry say what the pointer says, and note in the pointer that it does; return versions by alias.

    Raises TrackingError when MLflow refuses; the pointer stays as it is, and the next call tries again.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    while True:
        standing = read_standing(store, model)
        try:
            versions = _mirror(client, model, standing)
        except MlflowException as error:
            raise TrackingError(f"MLflow at {tracking_uri}, registered model {model!r}: {str(error)[:400]}") from error
        note_mirrored(store, model, standing)
        if read_standing(store, model).number == standing.number:  # else what was just written may be of the past
            return versions


def note_mirrored(store: Store, model: str, standing: Standing) -> None:
    """Keep in the pointer that MLflow's aliases say what this standing says."""
    if standing.number > 0:
        _write_pointer(store, model, standing.model_copy(update={"mirrored": standing.number}))


def _mirror(client: MlflowClient, model: str, standing: Standing) -> dict[str, str]:
    try:
        held: dict[str, str] = dict(client.get_registered_model(model).aliases)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model, description="Policies that varflow's gate measured; its pointer decides.")
        held = {}
    known = {version.tags.get("varflow.ref"): version for version in client.search_model_versions(f"name='{model}'")}
    wanted: dict[str, str] = {}
    for alias in ALIASES:
        entry: Entry | None = getattr(standing, alias)
        if entry is None:
            continue
        version = known.get(entry.ref) or client.create_model_version(
            model, source=entry.source, run_id=entry.mlflow_run or None,
            tags={"varflow.ref": entry.ref, "varflow.digest": entry.digest},
            await_creation_for=0,  # nothing is copied, so there is nothing to wait for
        )  # fmt: skip
        known[entry.ref] = version
        wanted[alias] = str(version.version)
        for key, value in (("varflow.verdict", entry.verdict), ("varflow.decision", entry.decision)):
            if value and version.tags.get(key) != value:
                client.set_model_version_tag(model, version.version, key, value)
    for alias in ALIASES:
        if alias in wanted and str(held.get(alias)) != wanted[alias]:
            client.set_registered_model_alias(model, alias, wanted[alias])
        elif alias not in wanted and alias in held:
            client.delete_registered_model_alias(model, alias)
    return wanted


def _holds(champion: Entry | None, candidate: Candidate) -> bool:
    return champion is not None and (champion.ref, champion.digest) == (candidate.ref, candidate.digest)


def _entry(
    candidate: Candidate, move: Move, standing: Standing, *, previous: int | None = None, restores: int | None = None
) -> Entry:
    """Return the entry that would come next."""
    return Entry(
        **candidate.model_dump(), number=standing.number + 1, move=move, previous=previous, restores=restores,
        at=datetime.now(UTC).isoformat(timespec="seconds"), token=uuid.uuid4().hex,
    )  # fmt: skip


def _check_unused(candidate: Candidate, history: list[Entry], *, model: str) -> None:
    if refusal := find_refusal(history, verdict=candidate.verdict):
        raise VerdictUsed(
            f"{candidate.ref}: its verdict {candidate.verdict[:21]}… was refused by a person (entry {refusal.number}, {refusal.at}: "
            f"{refusal.reason}); measure the model anew, or promote it with --without-gate REASON"
        )
    used = [e for e in history if e.move is Move.promoted and (e.verdict, e.ref) == (candidate.verdict, candidate.ref)]
    if not used:
        return
    after = next((e for e in history if e.number > used[-1].number and e.move is Move.rolled_back), None)
    what = f"rolled back by entry {after.number} ({after.reason})" if after else "replaced since"
    raise VerdictUsed(
        f"{candidate.ref}: its verdict {candidate.verdict[:21]}… made it champion of {model!r} as entry {used[-1].number}, and "
        f"it was {what}; a verdict promotes once: measure the model anew, or promote it with --without-gate REASON"
    )


def _find_target(store: Store, model: str, standing: Standing, *, to: int | None) -> Entry:
    """Return the promotion that a rollback goes back to."""
    if standing.champion is None:
        raise ValueError(f"model {model!r}: nothing was promoted yet, so there is nothing to roll back")
    if to is None:
        if standing.previous is None:
            raise ValueError(
                f"model {model!r}: its champion {standing.champion.ref} (entry {standing.champion.number}) is the first one; "
                "name another entry with --to, as `varflow history` lists them"
            )
        return standing.previous
    entry = read_entry(store, model, to)
    if entry.move is Move.rolled_back:
        assert entry.restores is not None
        entry = read_entry(store, model, entry.restores)
    if entry.move is not Move.promoted:
        raise ValueError(
            f"history of {model!r}: entry {to} says that {entry.ref} was {entry.move}; it was never champion: expected an entry that "
            "promoted a model"
        )
    return entry


def _append(store: Store, model: str, decide: Callable[[Standing], Entry | None]) -> Standing:
    """Put the entry that `decide` makes of the standing, again after each lost race, and bring the pointer up."""
    for _ in range(RACES):
        standing, behind = _read(store, model)
        entry = decide(standing)
        if entry is None:
            return _write_pointer(store, model, standing) if behind else standing
        try:
            store.put(_entry_name(model, entry.number), _dump(entry), create=True)
        except PreconditionFailed:
            held = _get_entry(store, model, entry.number)
            if held is None or held.token != entry.token:
                continue  # another move came first
        return _write_pointer(store, model, _advance(store, model, standing, entry))
    raise ChampionMoved(
        f"history of {model!r}: {RACES} other moves came first, one after the other; look who makes them"
    )


def _read(store: Store, model: str) -> tuple[Standing, bool]:
    """Return the standing after all entries, and whether the pointer is behind."""
    pointer = standing = _read_pointer(store, model)[0]
    while entry := _get_entry(store, model, standing.number + 1):
        standing = _advance(store, model, standing, entry)
    return standing, standing.number > pointer.number


def _advance(store: Store, model: str, standing: Standing, entry: Entry) -> Standing:
    """Return what the history comes to with one more entry."""
    changed: dict[str, object] = {"number": entry.number}
    if entry.move in (Move.measured, Move.refused):
        is_champion = standing.champion is not None and entry.ref == standing.champion.ref
        changed |= {"challenger": None if is_champion else entry}
    elif entry.move is Move.promoted:
        changed |= {"champion": entry, "previous": standing.champion, "challenger": None}
    else:
        assert entry.restores is not None
        champion = read_entry(store, model, entry.restores)
        before = read_entry(store, model, champion.previous) if champion.previous else None
        changed |= {"champion": champion, "previous": before}
    return standing.model_copy(update=changed)


def _read_pointer(store: Store, model: str) -> tuple[Standing, str | None]:
    found = store.get(pointer_name(model))
    if found is None:
        return Standing(), None
    try:
        return Standing.model_validate_json(found[0]), found[1]
    except ValidationError as error:
        fields = ", ".join(sorted({str(fault["loc"][0]) for fault in error.errors()}))
        raise ValueError(
            f"{store.url(pointer_name(model))}: got a pointer of another version of varflow ({fields}), expected number, "
            "champion, previous, challenger; move it away and promote its champion with --without-gate REASON"
        ) from error


def _write_pointer(store: Store, model: str, standing: Standing) -> Standing:
    """Bring the pointer up to a standing, unless another writer was as far already; return the standing."""
    for _ in range(RACES):
        pointer, etag = _read_pointer(store, model)
        if (pointer.number, pointer.mirrored) >= (standing.number, standing.mirrored):
            return standing
        mirrored = max(pointer.mirrored, standing.mirrored)
        wanted = standing.model_copy(update={"mirrored": mirrored})
        try:
            store.put(pointer_name(model), _dump(wanted), create=etag is None, replace=etag)
        except PreconditionFailed:
            continue
        return wanted
    raise ChampionMoved(f"pointer of {model!r}: {RACES} other writers came first; look who they are")


def _entry_name(model: str, number: int) -> str:
    return f"models/{model}/history/{number:08d}.json"


def _get_entry(store: Store, model: str, number: int) -> Entry | None:
    found = store.get(_entry_name(model, number))
    return Entry.model_validate_json(found[0]) if found else None


def _dump(value: BaseModel) -> bytes:
    return json.dumps(value.model_dump(mode="json"), indent=1).encode()
