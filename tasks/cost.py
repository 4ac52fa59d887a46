"""What steps cost: seconds, devices, tokens, and USD where the price of a device is known."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.records import Record
from training.devices import find_price


@dataclass(frozen=True)
class Total:
    """Seconds of all steps, USD of those that have a price, None where none has, and the seconds of those that have none."""

    seconds: float
    usd: float | None
    unpriced_seconds: float


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
