"""The looks of a year, on a real S3."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from evaluation.config import GateConfig
from flows.align import plan_align
from flows.overrides import override
from flows.recipes import smoke
from infra import looks
from infra.settings import Settings, read_settings
from infra.store import Store, open_store
from tasks.gate import plan_look, take_look
from tasks.step import Planned


@pytest.fixture
def store(s3: Settings) -> Store:
    """Give a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test_{uuid.uuid4().hex[:8]}"}))


def gate_of(**changes: str) -> Planned:
    """Return the gate of a recipe, at no look."""
    words = [f"{path.replace('__', '.')}={value}" for path, value in changes.items()]
    nowhere = Store(bucket="nowhere", endpoint="http://127.0.0.1:9", access_key="none", secret_key="none")
    return plan_align(override(smoke(), words), store=nowhere, settings=read_settings()).gate


def take(gate: Planned, store: Store) -> list[tuple[float, bool]]:
    """Take a look, twice as a rerun does, and return (alpha, planned) of those before it."""
    first, again = (take_look(gate, store=store, model="smoke-policy") for _ in range(2))
    assert first.fingerprint == again.fingerprint == plan_look(gate, store=store, model="smoke-policy").fingerprint
    assert isinstance(first.config, GateConfig)
    return [(look.alpha, look.planned) for look in first.config.looks]


def test_each_new_evidence_is_a_look_and_a_rerun_is_the_same_one(store: Store) -> None:
    planned = [gate_of(gate__planned_looks="2", train__seed=str(seed)) for seed in range(4)]
    assert [len(take(gate, store)) for gate in planned] == [0, 1, 2, 2]  # nothing is left for the third, nor the fourth
    assert [len(take(gate, store)) for gate in planned] == [0, 1, 2, 2]
    assert take(planned[2], store) == [(0.025, True)] * 2
    other = plan_look(planned[3], store=store, model="other")
    assert isinstance(other.config, GateConfig) and other.config.looks == ()


def test_looks_are_on_record_with_their_error_whatever_was_planned(store: Store) -> None:
    assert take(gate_of(), store) == []
    assert take(gate_of(train__seed="1"), store) == [(0.05, False)]
    assert take(gate_of(gate__planned_looks="2"), store) == [(0.05, False)] * 2  # another policy is another look
    # Planned as one with all of the error, a look leaves nothing for a year that is then planned as twelve.
    assert take(gate_of(gate__planned_looks="1", train__seed="2"), store)[2:] == [(0.025, True)]
    stretched = gate_of(gate__planned_looks="12", train__seed="3")
    assert len(take(stretched, store)) == 3, "half of the year's error was left, and the look at all of it not taken"
    for seed in range(4, 12):
        take(gate_of(gate__planned_looks="12", train__seed=str(seed)), store)
    found = looks.read_before(store, model="smoke-policy", evidence="none", year=looks.this_year())
    assert sum(look["alpha"] for look in found if look["planned"]) <= 0.05 * (1 + 1e-9)
    assert len(found) == 2 + 1 + 6  # 0.025, and six twelfths of 0.05


def test_a_list_of_an_older_version_is_read(store: Store) -> None:
    entry = {"evidence": "a" * 64, "at": "2026-01-01T00:00:00+00:00"}
    name = looks.list_name("smoke-policy", looks.this_year())
    store.put(name, json.dumps({"looks": [entry]}).encode(), create=True)
    assert take(gate_of(gate__planned_looks="4"), store) == [(0.0125, True)]
    assert json.loads(store.get(name)[0])["looks"][0] == entry  # type: ignore[index]


def test_what_was_looked_at_last_year_is_no_new_look(store: Store) -> None:
    gate, year = gate_of(), looks.this_year()
    for number, evidence in enumerate(("before", gate.fingerprint)):
        assert looks.take(
            store, model="smoke-policy", evidence=evidence, before=number, year=year - 1, alpha=0.05, planned=False
        )
    assert take(gate, store) == [(0.05, False)]
    assert looks.read_before(store, model="smoke-policy", evidence="none", year=year) == []
    assert take(gate_of(train__seed="1"), store) == []


def test_of_looks_at_once_each_has_its_own_place(store: Store) -> None:
    gates = [gate_of(train__seed=str(seed)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda gate: take_look(gate, store=store, model="policy"), gates))
    places = [len(gate.config.model_dump()["looks"]) for gate in taken]
    assert sorted(places) == [0, 1, 2, 3]
    assert [plan_look(gate, store=store, model="policy").fingerprint for gate in gates] == [
        g.fingerprint for g in taken
    ]
    late = looks.take(store, model="policy", evidence="x", before=0, year=looks.this_year(), alpha=0.05, planned=True)
    assert not late
