"""How often a model's gate was asked in a year, and at what error: an append-only list in the store, moved by compare-and-swap.

Every look at new evidence is an entry, whatever it says; the same evidence again is the same look.
"""

import json
from datetime import UTC, datetime
from typing import Any

from infra.store import PreconditionFailed, Store


def list_name(model: str, year: int) -> str:
    """Return where the looks of a year lie in the store."""
    return f"models/{model}/looks/{year}.json"


def this_year() -> int:
    """Return the present year, UTC."""
    return datetime.now(UTC).year


def year_of(store: Store, *, model: str, evidence: str) -> int:
    """Return the year that the look at this evidence counts in: last year where it was taken then, else the present one."""
    year = this_year()
    taken = any(look["evidence"] == evidence for look in _read(store, model, year - 1)[0])
    return year - 1 if taken else year


def read_before(store: Store, *, model: str, evidence: str, year: int) -> list[dict[str, Any]]:
    """Return the looks of the year before the one at this evidence, which may have been taken or not.

    `alpha` and `planned` are absent of those that a version wrote which kept neither, and knew planned looks alone.
    """
    found = _read(store, model, year)[0]
    seen = [look["evidence"] for look in found]
    return found[: seen.index(evidence)] if evidence in seen else found


def take(store: Store, *, model: str, evidence: str, before: int, year: int, alpha: float, planned: bool) -> bool:
    """Put a look into the list as the one after `before` others and tell whether it is there; False where others came first."""
    looks, etag = _read(store, model, year)
    seen = [look["evidence"] for look in looks]
    if evidence in seen or len(seen) != before:
        return evidence in seen and seen.index(evidence) == before
    entry = {"evidence": evidence, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    data = json.dumps({"looks": [*looks, entry | {"alpha": alpha, "planned": planned}]}, indent=1).encode()
    try:
        store.put(list_name(model, year), data, create=etag is None, replace=etag)
    except PreconditionFailed:  # by another look, or by this one if the answer to it was lost
        return take(store, model=model, evidence=evidence, before=before, year=year, alpha=alpha, planned=planned)
    return True


def _read(store: Store, model: str, year: int) -> tuple[list[dict[str, Any]], str | None]:
    found = store.get(list_name(model, year))
    return (json.loads(found[0])["looks"], found[1]) if found else ([], None)
