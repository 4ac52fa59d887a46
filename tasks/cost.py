"""What steps cost: seconds, devices, tokens, and USD where the price of a device is known."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.records import Record
from training.devices import find_price
from training.job import write_json

KEEP_SECONDS = 10.0  # at most so many are lost where this process is killed


@dataclass(frozen=True)
class Total:
    """Seconds of all steps, USD of those that have a price, None where none has, and the seconds of those that have none."""

    seconds: float
    usd: float | None
    unpriced_seconds: float


class Spent:
    """The seconds of all attempts at a step, in a file of its work folder, which goes once the step is recorded. As a context it keeps
    them at its end, however that comes."""

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        self._earlier = float(json.loads(path.read_text())) if path.exists() else 0.0
        self._next = self._started + KEEP_SECONDS

    @property
    def seconds(self) -> float:
        """Those of earlier attempts, and of this one up to now."""
        return self._earlier + time.monotonic() - self._started

    def keep(self) -> None:
        """Write them down, at most every KEEP_SECONDS; call it as often as you like."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + KEEP_SECONDS
        with suppress(OSError):  # a full disk costs a figure, not the work
            write_json(self._path, round(self.seconds, 3))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next = 0.0
        self.keep()


def price_step(
    hardware: Mapping[str, Any], summary: Mapping[str, Any], *, seconds: float, usd_per_hour: float | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Return (cost, what it rests on) of a step that computed for `seconds` on some hardware; without USD where no price is known."""
    used = seconds * hardware["devices"]
    cost = {"wall_seconds": round(seconds, 3), "device_seconds": round(used, 3)}
    if isinstance(tokens := summary.get("tokens"), int):
        cost["tokens"] = tokens
    facts = {"device": str(hardware["device"])}
    if price := find_price(facts["device"], given=usd_per_hour):
        cost |= {"usd_per_hour": price.usd_per_hour, "usd": round(used / 3600 * price.usd_per_hour, 6)}
        facts["price"] = price.basis
    return cost, facts


def total_costs(costs: Iterable[Mapping[str, float]]) -> Total:
    """Return what several steps cost together."""
    known = [(cost.get("wall_seconds", 0.0), cost.get("usd")) for cost in costs]
    usd = [paid for _, paid in known if paid is not None]
    return Total(
        seconds=sum(seconds for seconds, _ in known),
        usd=sum(usd) if usd else None,
        unpriced_seconds=sum(seconds for seconds, paid in known if paid is None),
    )


def list_prices(records: Iterable[Record]) -> list[str]:
    """Return the prices by which steps were counted."""
    return sorted({str(record.provenance["price"]) for record in records if "price" in record.provenance})


def show_total(total: Total, *, prices: Sequence[str]) -> str:
    """Return the total as a sentence, with the prices that it rests on."""
    if total.usd is None:
        return "No price of these devices is known: set VARFLOW_USD_PER_HOUR to have USD."
    without = f", without {total.unpriced_seconds:,.0f} s that have no price" if total.unpriced_seconds else ""
    return f"{total.usd:,.4g} USD{without} ({'; '.join(prices)})."
