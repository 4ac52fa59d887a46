"""Which responses of a row are trained on."""

from collections.abc import Callable
from typing import Any

Select = Callable[[dict[str, Any]], list[int]]  # a row to places among its responses, in the order of training


def select_preferred_first(row: dict[str, Any], *, distinct: bool) -> list[int]:
    """Select the preferred response, then those that differ from it; nothing where nobody said which is preferred.

    `distinct` takes each text once, as a fixed set holds it; among samples a repetition is evidence.
    """
    if row["preferred"] is None:
        return []
    responses = row["responses"]
    places = select_distinct(row) if distinct else select_all(row)
    return [row["preferred"], *(k for k in places if responses[k] != responses[row["preferred"]])]


def select_chosen(row: dict[str, Any]) -> list[int]:
    """Select the preferred response; nothing where nobody said which."""
    return [] if row["preferred"] is None else [row["preferred"]]


def select_all(row: dict[str, Any]) -> list[int]:
    """Select every response."""
    return list(range(len(row["responses"])))


def select_distinct(row: dict[str, Any]) -> list[int]:
    """Select the first of equal responses: a fixed set holds each response once."""
    first: dict[str, int] = {}
    for place, response in enumerate(row["responses"]):
        first.setdefault(response, place)
    return list(first.values())
