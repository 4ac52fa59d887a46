"""Who is champion, on a real S3 server and a real MLflow: an append-only history, one winner, a way back."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient

from infra import registry
from infra.registry import Candidate, ChampionMoved, Move, VerdictUsed
from infra.settings import Settings
from infra.store import Store, open_store

BASE = "ba5e" * 16


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}"}))


def candidate(name: str, *, over: str = BASE, verdict: str | None = None, **more: Any) -> Candidate:
    verdict = f"gate/{name}-over-{over[:4]}" if verdict is None else verdict
    return Candidate(
        ref=f"train/{name}", digest=f"{name} bytes", over=over, verdict=verdict, decision="PROMOTE" if verdict else "",
        source="s3://bucket/x", mlflow_run="", by="a test", **more,
    )  # fmt: skip


def refs(store: Store) -> tuple[str | None, str | None, str | None]:
    standing = registry.read_standing(store, "m")
    return tuple(entry.ref if entry else None for entry in (standing.champion, standing.previous, standing.challenger))  # type: ignore[return-value]


def test_the_champion_moves_only_over_the_one_it_was_measured_against(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))
    registry.promote(store, "m", candidate("b", over="a"))
    registry.promote(store, "m", candidate("b", over="a"))  # again: nothing happens
    with pytest.raises(ChampionMoved, match=r"got train/b .*expected a…, which train/c was measured against"):
        registry.promote(store, "m", candidate("c", over="a"))
    history = registry.read_history(store, "m")
    assert [(e.number, e.move, e.ref, e.previous) for e in history] == [
        (1, Move.promoted, "train/a", None),
        (2, Move.promoted, "train/b", 1),
    ]
    assert refs(store) == ("train/b", "train/a", None)
    found = store.get("models/m/champion.json")
    assert found and json.loads(found[0])["champion"]["ref"] == "train/b"


def test_of_many_promotions_at_once_one_wins_and_the_others_are_told(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))

    def attempt(name: str) -> str:
        try:
            registry.promote(store, "m", candidate(name, over="a"))
        except ChampionMoved as moved:
            return str(moved)
        return "won"

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(attempt, "bcdefg"))
    assert told.count("won") == 1
    winner = f"train/{'bcdefg'[told.index('won')]}"
    assert all(f"got {winner} (entry 2" in text for text in told if text != "won")
    assert refs(store)[:2] == (winner, "train/a")
    assert [entry.number for entry in registry.read_history(store, "m")] == [1, 2]


def test_entries_of_looks_at_once_all_come_in_one_after_the_other(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: registry.measure(store, "m", candidate(n, verdict=f"gate/{n}")), "abcdef"))
        list(pool.map(lambda n: registry.measure(store, "m", candidate(n, verdict=f"gate/{n}")), "abcdef"))
    history = registry.read_history(store, "m")
    assert [entry.number for entry in history] == [1, 2, 3, 4, 5, 6], "a verdict is kept once"
    assert {entry.ref for entry in history} == {f"train/{name}" for name in "abcdef"}
    assert registry.read_standing(store, "m").number == 6
    assert refs(store)[0] is None and refs(store)[2] == history[-1].ref


def test_rolling_back_goes_back_one_by_one_or_to_an_entry(store: Store) -> None:
    for name, over in (("a", BASE), ("b", "a"), ("c", "b")):
        registry.promote(store, "m", candidate(name, over=over))
    registry.measure(store, "m", candidate("d", over="c"))
    with pytest.raises(ValueError, match=r"entry 4 says that train/d was measured; it was never champion"):
        registry.roll_back(store, "m", to=4, reason="", by="me")
    registry.roll_back(store, "m", to=None, reason="it swears", by="me")
    assert refs(store) == ("train/b", "train/a", "train/d")
    last = registry.read_history(store, "m")[-1]
    assert (last.move, last.ref, last.over, last.reason, last.restores) == (
        Move.rolled_back, "train/b", "c", "it swears", 2,
    )  # fmt: skip
    registry.note_mirrored(store, "m", registry.read_standing(store, "m"))
    registry.roll_back(store, "m", to=None, reason="that too", by="me")
    assert refs(store)[:2] == ("train/a", None)
    _, moved = registry.roll_back(store, "m", to=3, reason="c was right", by="me")
    assert moved and refs(store)[:2] == ("train/c", "train/b")
    _, moved = registry.roll_back(store, "m", to=7, reason="c was right", by="me")
    assert not moved, "entry 7 is the rollback to c, which is champion"
    for _ in range(2):
        registry.note_mirrored(store, "m", registry.read_standing(store, "m"))
        registry.roll_back(store, "m", to=None, reason="all of them", by="me")
    registry.note_mirrored(store, "m", registry.read_standing(store, "m"))
    with pytest.raises(ValueError, match=r"is the first one; name another entry with --to"):
        registry.roll_back(store, "m", to=None, reason="all of them", by="me")


def test_a_verdict_promotes_once_so_that_no_schedule_brings_back_what_was_rolled_back(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))
    registry.promote(store, "m", candidate("b", over="a"))
    registry.roll_back(store, "m", to=None, reason="it swears", by="me")
    with pytest.raises(VerdictUsed, match=r"as entry 2, and it was rolled back by entry 3 \(it swears\)"):
        registry.promote(store, "m", candidate("b", over="a"))
    registry.promote(store, "m", candidate("b", over="a", verdict="gate/measured-anew"))
    registry.roll_back(store, "m", to=1, reason="again", by="me")
    registry.promote(store, "m", candidate("b", over="a", verdict="", reason="I heard both"))
    assert refs(store)[:2] == ("train/b", "train/a")


def test_nothing_is_promoted_by_nobodys_word(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))
    with pytest.raises(AssertionError, match="train/b: neither a verdict nor a reason"):
        registry.promote(store, "m", candidate("b", over="a", verdict=""))
    assert len(registry.read_history(store, "m")) == 1


def test_of_a_look_and_a_refusal_by_one_verdict_both_are_kept_and_neither_can_be_gone_back_to(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))
    registry.measure(store, "m", candidate("b", over="a"))
    registry.refuse(store, "m", candidate("b", over="a", reason="not approved: no note"))
    registry.measure(store, "m", candidate("b", over="a"))
    assert [entry.move for entry in registry.read_history(store, "m")] == [Move.promoted, Move.measured, Move.refused]
    assert refs(store) == ("train/a", None, "train/b")
    with pytest.raises(ValueError, match=r"entry 3 says that train/b was refused; it was never champion"):
        registry.roll_back(store, "m", to=3, reason="", by="me")


def test_what_a_killed_call_left_undone_is_read_as_done_and_finished_by_the_next(store: Store) -> None:
    registry.promote(store, "m", candidate("a"))
    behind = store.get(registry.pointer_name("m"))
    registry.promote(store, "m", candidate("b", over="a"))
    store.put(registry.pointer_name("m"), behind[0] if behind else b"")  # as if the pointer's write had never come
    assert refs(store)[:2] == ("train/b", "train/a")
    with pytest.raises(ChampionMoved, match="got train/b"):
        registry.promote(store, "m", candidate("c", over="a"))
    registry.promote(store, "m", candidate("b", over="a"))
    found = store.get(registry.pointer_name("m"))
    assert found and json.loads(found[0])["number"] == 2
    assert len(registry.read_history(store, "m")) == 2


def test_a_rollback_begun_by_a_killed_call_is_finished_and_goes_no_further(store: Store) -> None:
    for name, over in (("a", BASE), ("b", "a"), ("c", "b")):
        registry.promote(store, "m", candidate(name, over=over))
    behind = store.get(registry.pointer_name("m"))
    registry.roll_back(store, "m", to=None, reason="slow", by="me")
    store.put(registry.pointer_name("m"), behind[0] if behind else b"")
    _, moved = registry.roll_back(store, "m", to=None, reason="slow", by="me")
    assert not moved and refs(store)[0] == "train/b"
    assert len(registry.read_history(store, "m")) == 4


def test_a_pointer_of_another_version_is_refused_with_what_to_do(store: Store) -> None:
    store.put(registry.pointer_name("m"), b'{"history": []}')
    with pytest.raises(ValueError, match=r"got a pointer of another version of varflow \(history\).*--without-gate"):
        registry.read_standing(store, "m")


def test_mlflow_aliases_follow_the_pointer_and_are_repaired(stack: Settings, store: Store) -> None:
    model = f"m-{uuid.uuid4().hex[:8]}"
    client = MlflowClient(tracking_uri=stack.mlflow_tracking_uri)

    def aliases() -> dict[str, str]:
        registry.mirror(store, model, tracking_uri=stack.mlflow_tracking_uri)
        held = client.get_registered_model(model).aliases
        return {alias: client.get_model_version(model, version).tags["varflow.ref"] for alias, version in held.items()}

    registry.promote(store, model, candidate("a"))
    registry.promote(store, model, candidate("b", over="a"))
    registry.measure(store, model, candidate("c", over="b"))
    assert aliases() == {"champion": "train/b", "previous": "train/a", "challenger": "train/c"}
    client.set_registered_model_alias(model, "champion", "1")  # somebody else's hand
    client.delete_registered_model_alias(model, "previous")
    assert aliases() == {"champion": "train/b", "previous": "train/a", "challenger": "train/c"}
    registry.promote(store, model, candidate("c", over="b"))
    assert aliases() == {"champion": "train/c", "previous": "train/b"}
    registry.roll_back(store, model, to=None, reason="", by="me")
    assert aliases() == {"champion": "train/b", "previous": "train/a"}
    assert registry.read_standing(store, model).mirrored == 5
    assert len(client.search_model_versions(f"name='{model}'")) == 3, "one version a model, however often it moves"
