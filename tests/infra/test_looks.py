"""The looks of a year, on a real S3."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from flows.align import plan_align
from flows.overrides import override
from flows.recipes import smoke
from infra import looks
from infra.settings import Settings
from infra.store import Store, open_store
from tasks.gate import spend_look
from tasks.step import Planned


@pytest.fixture
def store(s3: Settings) -> Store:
    """Give a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test_{uuid.uuid4().hex[:8]}"}))


def gate_of(store: Store, settings: Settings, **changes: str) -> Planned:
    words = [f"{path.replace('__', '.')}={value}" for path, value in changes.items()]
    return plan_align(override(smoke(), words), store=store, settings=settings).gate


def test_a_plan_knows_which_look_it_is_and_a_rerun_is_the_same_look(store: Store, s3: Settings) -> None:
    assert gate_of(store, s3).config.model_dump()["looks_spent"] == 0
    first = gate_of(store, s3, gate__planned_looks="2")
    spend_look(first, store=store, model="smoke-policy")
    spend_look(first, store=store, model="smoke-policy")
    assert gate_of(store, s3, gate__planned_looks="2").fingerprint == first.fingerprint
    second = gate_of(store, s3, gate__planned_looks="2", train__seed="5")
    assert second.config.model_dump()["looks_spent"] == 1
    spend_look(second, store=store, model="smoke-policy")
    third = gate_of(store, s3, gate__planned_looks="2", train__seed="6")
    assert third.config.model_dump()["looks_spent"] == 2
    spend_look(third, store=store, model="smoke-policy")  # nothing is left to spend: the gate will hold
    assert gate_of(store, s3, gate__planned_looks="2", train__seed="7").config.model_dump()["looks_spent"] == 2


def test_each_new_evidence_is_a_look_and_the_same_again_is_not(store: Store) -> None:
    for number, evidence in enumerate(("a", "b", "c")):
        before = looks.count_before(store, model="policy", evidence=evidence, year=2026)
        assert before == number
        for _ in range(2):
            looks.spend(store, model="policy", evidence=evidence, before=before, year=2026)
    assert [looks.count_before(store, model="policy", evidence=e, year=2026) for e in ("a", "c", "new")] == [0, 2, 3]
    assert looks.count_before(store, model="policy", evidence="new", year=2027) == 0
    assert looks.count_before(store, model="other", evidence="new", year=2026) == 0


def test_of_looks_at_once_one_is_the_next_and_the_others_are_told(store: Store) -> None:
    def take(evidence: str) -> str:
        try:
            looks.spend(store, model="policy", evidence=evidence, before=0, year=2026)
        except ValueError as refusal:
            return str(refusal)
        return ""

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(take, ("a", "b", "c", "d")))
    assert said.count("") == 1
    assert all("1 looks of 2026 are spent, and 0 were when this run was planned" in text for text in said if text)
    taken = "abcd"[said.index("")]
    assert looks.count_before(store, model="policy", evidence=taken, year=2026) == 0
    assert looks.count_before(store, model="policy", evidence="new", year=2026) == 1
