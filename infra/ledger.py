"""The ledger of preference batches: what landed, once, and what was trained on it.

A batch is known by the SHA-256 of its bytes, so the same file pushed twice is one batch. Its entry is written after its
bytes; the bytes of an entry never change. A snapshot is a set of batches; a claim says which run trains on a snapshot with
a recipe, and is put where none was: of several triggers for the same news, one wins.
"""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.fingerprint import fingerprint
from infra.provenance import name_process
from infra.store import PreconditionFailed, Store, digest_bytes


def receive(store: Store, path: Path) -> tuple[str, bool]:
    """Store a batch of preferences; return (its digest, whether it is new)."""
    data = path.read_bytes()
    digest = digest_bytes(data)
    name = f"preferences/batches/{digest}/{batch_file(path)}"
    entry = {"digest": digest, "file": name, "bytes": len(data), "received": _now(), "origin": path.name}
    if store.stat(f"ledger/{digest}.json"):
        return digest, False
    store.put(name, data)
    try:
        store.put(f"ledger/{digest}.json", json.dumps(entry, indent=1).encode(), create=True)
    except PreconditionFailed:  # pushed twice at the same moment: the entries say the same
        return digest, False
    return digest, True


def batch_file(path: Path) -> str:
    """Return the batch's file name, which keeps the ending that tells its format."""
    return "rows" + "".join(path.suffixes[-2:])


def entries(store: Store) -> list[dict[str, Any]]:
    """Return every batch's entry, oldest first."""
    found = [store.get(item.name) for item in store.scan("ledger")]
    return sorted((json.loads(item[0]) for item in found if item), key=lambda e: (e["received"], e["digest"]))


def write_snapshot(store: Store, digests: list[str]) -> str:
    """Store the list of batches that a training run is to use; return the snapshot's digest."""
    batches = sorted(digests)
    digest = fingerprint(batches)
    with suppress(PreconditionFailed):  # the same set has the same name and the same text
        store.put(f"preferences/snapshots/{digest}.json", json.dumps(batches).encode(), create=True)
    return digest


def read_snapshot(store: Store, digest: str) -> list[dict[str, Any]]:
    """Return the ledger entries of a snapshot. Raises ValueError for an unknown one."""
    found = store.get(f"preferences/snapshots/{digest}.json")
    if found is None:
        raise ValueError(
            f"snapshot {digest!r}: not in {store.url('preferences/snapshots')}; `varflow push` makes batches"
        )
    wanted = set(json.loads(found[0]))
    return [entry for entry in entries(store) if entry["digest"] in wanted]


def read_claim(store: Store, snapshot: str, recipe: str) -> tuple[dict[str, Any], str] | None:
    """Return (claim, etag) of a recipe's training on a snapshot; None where nobody claimed it."""
    found = store.get(_claim_name(snapshot, recipe))
    return (json.loads(found[0]), found[1]) if found else None


def claim(store: Store, *, snapshot: str, recipe: str, run: str, over: str | None = None) -> bool:
    """Claim a recipe's training on a snapshot for a flow run; `over` takes the place of a claim with this etag.

    False when another run holds it. The claim names this process: a run that is killed can tell nobody that it is over.
    """
    text = json.dumps(
        {
            "snapshot": snapshot,
            "recipe": recipe,
            "run": run,
            "state": "running",
            "at": _now(),
            "process": name_process(),
        }
    ).encode()
    try:
        store.put(_claim_name(snapshot, recipe), text, create=over is None, replace=over)
    except PreconditionFailed:
        held = read_claim(store, snapshot, recipe)
        return bool(held and held[0]["run"] == run)  # our own write, whose answer was lost
    return True


def settle(store: Store, *, snapshot: str, recipe: str, run: str, state: str, outcome: str) -> None:
    """Close a claim as `done` or `failed`, with what came of it."""
    held = read_claim(store, snapshot, recipe)
    assert held and held[0]["run"] == run, "only the holder of a claim settles it"
    closed = held[0] | {"state": state, "outcome": outcome, "at": _now()}
    store.put(_claim_name(snapshot, recipe), json.dumps(closed).encode(), replace=held[1])


def consumed(store: Store, recipe: str) -> set[str]:
    """Return the digests of the batches that a finished training of this recipe used."""
    return _batches(store, [claim for claim in _claims(store, f"retrains/{recipe}") if claim["state"] == "done"])


def claimed(store: Store) -> set[str]:
    """Return the digests of the batches that any run has claimed, whatever came of it."""
    return _batches(store, _claims(store, "retrains"))


def _claims(store: Store, below: str) -> list[dict[str, Any]]:
    found = [store.get(item.name) for item in store.scan(below)]
    return [json.loads(item[0]) for item in found if item]


def _batches(store: Store, claims: list[dict[str, Any]]) -> set[str]:
    return {entry["digest"] for claim in claims for entry in read_snapshot(store, claim["snapshot"])}


def _claim_name(snapshot: str, recipe: str) -> str:
    return f"retrains/{recipe}/{snapshot}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
