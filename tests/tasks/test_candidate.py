"""Whether what is promoted is what was evaluated: records on a real S3 server, made by hand so that each part can be forged."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evaluation.gate.verdict import OlderVerdictError, compute_seal
from infra import records, registry
from infra.records import Record
from infra.registry import ChampionMoved, Move, VerdictUsed
from infra.settings import Settings
from infra.store import Store, StoreError, open_store
from infra.tracking import Tracking
from tasks.candidate import (
    check_evaluated,
    choose_verdict,
    find_candidate,
    find_model,
    make_candidate,
    promote_by_hand,
)
from tests.tasks.maker import Maker, decide_as


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}"}))


@pytest.fixture
def maker(store: Store, tmp_path: Path) -> Maker:
    return Maker(store, tmp_path)


def test_a_sealed_verdict_promotes_and_a_second_call_changes_nothing(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    verdict = maker.judge(model)
    standing, moved = promote_by_hand(store, "m", model, without_gate="")
    assert moved and standing.champion
    assert standing.champion.verdict == f"gate/{verdict.fingerprint}" and standing.champion.decision == "PROMOTE"
    assert standing.champion.digest == records.digest_files(model)
    again, moved = promote_by_hand(store, "m", model, without_gate="")
    assert not moved and again == standing
    challenger = maker.model(2)
    maker.judge(challenger, over=model)
    standing, _ = promote_by_hand(store, "m", challenger, without_gate="")
    assert standing.previous and standing.previous.fingerprint == model.fingerprint


def test_without_a_verdict_of_promote_a_reason_is_needed_and_kept(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    with pytest.raises(
        ValueError, match=r"the gate has said nothing about it, expected a verdict PROMOTE.*--without-gate"
    ):
        promote_by_hand(store, "m", model, without_gate="")
    maker.judge(model, decision="HOLD")
    with pytest.raises(ValueError, match=r"the gate says HOLD \(gate/.*: because\), expected PROMOTE"):
        promote_by_hand(store, "m", model, without_gate="")
    standing, moved = promote_by_hand(store, "m", model, without_gate="the paper's own weights")
    assert moved and standing.champion
    assert (standing.champion.verdict, standing.champion.reason) == ("", "the paper's own weights")
    assert "@" in standing.champion.by


def test_a_model_whose_bytes_are_not_those_evaluated_is_refused(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    maker.judge(model)
    store.delete(f"{model.prefix}/config.json")  # the artifact is lost, and made again with other bytes
    other = maker.model(1, weights="other weights")
    assert other.fingerprint == model.fingerprint and other.attempt != model.attempt
    with pytest.raises(ValueError, match=r"evaluate/\w+ read \w+.*what would be promoted is not what was evaluated"):
        promote_by_hand(store, "m", other, without_gate="")
    assert registry.read_standing(store, "m").champion is None


def test_a_champion_made_again_with_other_bytes_needs_a_verdict_or_a_reason_like_any_other(
    store: Store, maker: Maker
) -> None:
    model = maker.model(1)
    maker.judge(model)
    promote_by_hand(store, "m", model, without_gate="")
    store.delete(f"{model.prefix}/config.json")  # lost, and computed anew: a GPU gives other bytes
    other = maker.model(1, weights="other weights")
    with pytest.raises(ValueError, match=r"what would be promoted is not what was evaluated"):
        promote_by_hand(store, "m", other, without_gate="")
    assert len(registry.read_history(store, "m")) == 1
    standing, moved = promote_by_hand(store, "m", other, without_gate="the weights were lost")
    assert moved and standing.champion
    assert (standing.champion.digest, standing.champion.reason) == (
        records.digest_files(other),
        "the weights were lost",
    )


def test_the_newest_verdict_over_the_champion_decides_and_a_named_one_is_meant(
    store: Store, maker: Maker, stack: Settings
) -> None:
    first, second = maker.model(1), maker.model(2)
    promote_by_hand(store, "m", first, without_gate="the first")
    loose = maker.judge(second, over=first, config={"margin": 0.4}, created="2026-02-01T00:00:00+00:00")
    strict = maker.judge(
        second, over=first, decision="HOLD", config={"margin": 0.1}, created="2026-02-02T00:00:00+00:00"
    )
    tracking = Tracking(stack.mlflow_tracking_uri)
    with pytest.raises(ValueError, match=rf"the gate says HOLD \(gate/{strict.fingerprint[:12]}: because\)"):
        promote_by_hand(store, "m", second, without_gate="")
    named = find_candidate(store, f"gate/{strict.fingerprint}", tracking=tracking)
    assert named == (second, strict)
    with pytest.raises(ValueError, match=r"verdict\.json: says HOLD, expected PROMOTE"):
        promote_by_hand(store, "m", second, without_gate="", verdict=strict)
    assert len(registry.read_history(store, "m")) == 1
    standing, moved = promote_by_hand(store, "m", second, without_gate="", verdict=loose)
    assert moved and standing.champion and standing.champion.verdict == f"gate/{loose.fingerprint}"


def test_a_verdict_that_a_person_refused_promotes_nothing_any_more(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    verdict = maker.judge(model)
    no = make_candidate(store, model, verdict=verdict, by="a test", reason="not approved: odd samples")
    for _ in range(2):
        standing = registry.refuse(store, "m", no)
    assert standing.champion is None and standing.challenger and standing.challenger.fingerprint == model.fingerprint
    (entry,) = registry.read_history(store, "m")
    assert (entry.move, entry.decision, entry.reason) == (Move.refused, "PROMOTE", "not approved: odd samples")
    for named in (None, verdict):
        with pytest.raises(
            VerdictUsed, match=r"refused by a person \(entry 1, .*: not approved: odd samples\); measure"
        ):
            promote_by_hand(store, "m", model, without_gate="", verdict=named)
    standing, moved = promote_by_hand(store, "m", model, without_gate="they were fine")
    assert moved and standing.champion and standing.champion.reason == "they were fine"


def test_a_record_of_a_version_that_kept_no_digests_stands_in_no_way(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    old = maker.make("generate", {"policy": model}, {"responses.parquet": ""}, given={})
    maker.judge(model, answers=old)
    standing, moved = promote_by_hand(store, "m", model, without_gate="")
    assert moved and standing.champion and standing.champion.fingerprint == model.fingerprint


def test_weights_exchanged_in_the_store_are_refused_with_and_without_a_verdict(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    maker.judge(model)
    store.put(f"{model.prefix}/model.safetensors", b"WEIGHTS")
    for reason in ("", "trust me"):
        with pytest.raises(StoreError, match=r"model.safetensors: got SHA-256 \w+, expected \w+"):
            promote_by_hand(store, "m", model, without_gate=reason)


def test_a_verdict_that_was_rewritten_is_refused(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    verdict = maker.judge(model, decision="HOLD")
    store.put(f"{verdict.prefix}/verdict.json", b'{"decision": "PROMOTE"}')
    forged = verdict.model_copy(update={"summary": {"verdict": "PROMOTE", "reasons": []}})
    store.put(records.record_name("gate", verdict.fingerprint), records.dump(forged))
    with pytest.raises(ValueError, match="the verdict was changed"):
        promote_by_hand(store, "m", model, without_gate="")


def test_a_verdict_that_was_rewritten_with_its_record_still_breaks_its_seal(store: Store, maker: Maker) -> None:
    honest, forged = decide_as("HOLD"), decide_as("HOLD").model_dump(mode="json") | {"decision": "PROMOTE"}
    resealed = forged | {"seal": compute_seal(forged)}
    for text, told in ((forged, "it was changed after the gate wrote it"), (resealed, "the file was replaced")):
        model = maker.model(len(told))
        maker.judge(
            model, files={"verdict.json": json.dumps(text)}, summary={"verdict": "PROMOTE", "seal": honest.seal}
        )
        with pytest.raises(ValueError, match=told):
            promote_by_hand(store, "m", model, without_gate="")


def test_a_verdict_of_an_older_gate_promotes_nothing_and_says_what_to_do(store: Store, maker: Maker) -> None:
    model = maker.model(1)
    maker.judge(model, files={"verdict.json": '{"decision": "PROMOTE"}'})
    with pytest.raises(OlderVerdictError, match=r"^gate/\w+: .*gates before version 2 wrote it; run the gate again"):
        promote_by_hand(store, "m", model, without_gate="")


def test_a_verdict_about_another_model_is_no_word_on_this_one(store: Store, maker: Maker) -> None:
    verdict = maker.judge(maker.model(1))
    with pytest.raises(ValueError, match=r"is about \w+…, expected train/"):
        check_evaluated(store, maker.model(2), verdict=verdict)


def test_the_verdict_over_the_present_champion_is_taken_and_any_other_loses(store: Store, maker: Maker) -> None:
    first, second = maker.model(1), maker.model(2)
    promote_by_hand(store, "m", first, without_gate="the first")
    over_base = maker.judge(second, created="2026-02-02T00:00:00+00:00")
    with pytest.raises(ChampionMoved, match=r"got train/\w+ \(entry 1, .*expected ba5eba5eba5eba5e"):
        promote_by_hand(store, "m", second, without_gate="")
    over_first = maker.judge(second, over=first)
    chosen = choose_verdict(store, second, standing=registry.read_standing(store, "m"))
    assert chosen.fingerprint == over_first.fingerprint != over_base.fingerprint
    assert promote_by_hand(store, "m", second, without_gate="")[1]


def test_two_promoted_by_hand_at_once_over_the_same_champion(store: Store, maker: Maker) -> None:
    promote_by_hand(store, "m", maker.model(0), without_gate="the first")
    models = [maker.model(n) for n in range(1, 5)]
    for model in models:
        maker.judge(model, over=maker.model(0))

    def attempt(model: Record) -> str:
        try:
            return "won" if promote_by_hand(store, "m", model, without_gate="")[1] else "nothing"
        except ChampionMoved as moved:
            return str(moved)

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(attempt, models))
    assert told.count("won") == 1 and sum("run the pipeline again" in text for text in told) == 3
    assert len(registry.read_history(store, "m")) == 2


def test_a_model_is_found_by_its_reference_its_verdict_and_as_champion(
    store: Store, maker: Maker, stack: Settings
) -> None:
    tracking = Tracking(stack.mlflow_tracking_uri)
    model = maker.model(1)
    verdict = maker.judge(model)
    for reference in (f"train/{model.fingerprint}", model.fingerprint[:12], f"gate/{verdict.fingerprint[:12]}"):
        assert find_model(store, reference, tracking=tracking).attempt == model.attempt
    with pytest.raises(ValueError, match=r"expected a model: config\.json"):
        find_model(store, f"evaluate/{verdict.inputs['challenger_eval_mmlu']}", tracking=tracking)
    with pytest.raises(ValueError, match=r"got --model m, expected one of \(none was promoted yet\)"):
        find_model(store, "champion", tracking=tracking, model="m")
    maker.judge(maker.model(2), decision="HOLD")
    registry.measure(store, "m", make_candidate(store, model, verdict=verdict, by="a test"))
    with pytest.raises(ValueError, match="champion of 'm': nothing was promoted yet"):
        find_model(store, "champion", tracking=tracking)
    promote_by_hand(store, "m", model, without_gate="")
    assert find_model(store, "champion", tracking=tracking).attempt == model.attempt
