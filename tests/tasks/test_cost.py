"""What steps cost in USD: by a stated price, by the table's, or not at all."""

import pytest

from tasks.cost import Total, price_step, show_total, total_costs
from training.devices import PRICES_AS_OF, find_price
from training.job import CPU

H100 = {"device": "NVIDIA H100 80GB HBM3", "devices": 8}


def test_a_known_accelerator_has_the_assumed_price_of_each_device() -> None:
    cost, facts = price_step(H100, {"tokens": 12_000}, seconds=90.0, usd_per_hour=None)
    price = find_price("H100", given=None)
    assert price and cost["usd"] == pytest.approx(90 * 8 / 3600 * price.usd_per_hour)
    assert (cost["wall_seconds"], cost["device_seconds"], cost["tokens"]) == (90.0, 720.0, 12_000)
    assert facts["price"] == f"{price.usd_per_hour:g} USD an hour and device, assumed as of {PRICES_AS_OF}"


def test_a_given_price_holds_for_any_device_even_when_it_is_nothing() -> None:
    cost, facts = price_step(CPU, {}, seconds=1800.0, usd_per_hour=0.5)
    assert (cost["usd"], facts["price"]) == (0.25, "0.5 USD an hour and device, given")
    assert price_step(H100, {}, seconds=1800.0, usd_per_hour=0.0)[0]["usd"] == 0.0


def test_where_no_price_is_known_there_is_no_number() -> None:
    cost, facts = price_step(CPU, {}, seconds=10.0, usd_per_hour=None)
    assert cost == {"wall_seconds": 10.0, "device_seconds": 10.0} and facts == {"device": "cpu"}
    total = total_costs([cost, cost])
    assert total == Total(20.0, None, 20.0)
    assert show_total(total, prices=[]) == "No price of these devices is known: set VARFLOW_USD_PER_HOUR to have USD."


def test_a_total_says_what_it_leaves_out() -> None:
    paid, facts = price_step(H100, {}, seconds=3600.0, usd_per_hour=None)
    total = total_costs([paid, {"wall_seconds": 12.0}])
    assert total.usd == pytest.approx(8 * 2.99) and total.unpriced_seconds == 12.0
    assert show_total(total, prices=[facts["price"]]).startswith(
        "23.92 USD, without 12 s that have no price (2.99 USD an hour"
    )
