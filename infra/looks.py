"""How often a model's gate was asked in a year: an append-only list in the store, moved by compare-and-swap.

Every look at new evidence spends a part of the year's error, whatever it says; the same evidence again is the same look.
"""

import json
from datetime import UTC, datetime
from typing import Any

from infra.store import PreconditionFailed, Store


def list_name(model: str, year: int) -> str:
    """Return where the looks of a year lie in the store."""
    return f"models/{model}/looks/{year}.json"


def this_year() -> int:
    """Return the year that a look counts in, UTC."""
    return datetime.now(UTC).year


def count_before(store: Store, *, model: str, evidence: str, year: int) -> int:
    """Return how many looks of the year came before the one at this evidence, which may have been taken or not."""
    seen = [look["evidence"] for look in _read(store, model, year)[0]]
    return seen.index(evidence) if evidence in seen else len(seen)


def spend(store: Store, *, model: str, evidence: str, before: int, year: int) -> None:
    """Put a look into the list as the one after `before` others; doing it again changes nothing.

    Raises ValueError when other evidence was looked at since `before` was counted: alpha would be spent twice.
    """
    looks, etag = _read(store, model, year)
    seen = [look["evidence"] for look in looks]
    if evidence in seen:
        return
    if len(seen) != before:
        raise ValueError(
            f"gate of {model!r}: {len(seen)} looks of {year} are spent, and {before} were when this run was planned; run the same again, "
            "which then is the look after those"
        )
    looks.append({"evidence": evidence, "at": datetime.now(UTC).isoformat(timespec="seconds")})
    data = json.dumps({"looks": looks}, indent=1).encode()
    try:
        store.put(list_name(model, year), data, create=etag is None, replace=etag)
    except PreconditionFailed:
        spend(store, model=model, evidence=evidence, before=before, year=year)


def _read(store: Store, model: str, year: int) -> tuple[list[dict[str, Any]], str | None]:
    found = store.get(list_name(model, year))
    return (json.loads(found[0])["looks"], found[1]) if found else ([], None)
