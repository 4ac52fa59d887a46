"""A plan before it runs: which steps are done, which are not, and what changed since the last time."""

from collections.abc import Iterable
from typing import Any

from infra import records
from infra.fingerprint import diff_identities
from infra.store import Store
from tasks.step import Planned


def preview(steps: Iterable[Planned], *, store: Store) -> list[dict[str, Any]]:
    """Return, for every step of a plan, its fingerprint, whether its artifact is found, and what changed if not.

    What changed is told against the recorded step of that kind that differs least.
    """
    rows = []
    for planned in steps:
        record = records.find(store, step=planned.step.name, fingerprint=planned.fingerprint)
        changed = [] if record else shorten(nearest_difference(planned, store=store))
        rows.append({
            "step": planned.step.name,
            "title": planned.title,
            "fingerprint": planned.fingerprint,
            "cached": record is not None,
            "changed": changed,
        })  # fmt: skip
    return rows


def nearest_difference(planned: Planned, *, store: Store) -> list[str]:
    """Return the fields, `path: old -> new`, in which a step differs from the most like one on record; [] without any."""
    others = records.iterate(store, planned.step.name)
    differences = [diff_identities(other.identity, planned.identity) for other in others]
    return min(differences, key=len, default=[])


def shorten(differences: list[str]) -> list[str]:
    """Return the differences with those of inputs as one line of names: their fingerprints tell nobody anything."""
    inputs = [line.removeprefix("inputs.").partition(":")[0] for line in differences if line.startswith("inputs.")]
    others = [line for line in differences if not line.startswith("inputs.")]
    return others + ([f"inputs: {', '.join(inputs)}"] if inputs else [])
