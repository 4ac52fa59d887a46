"""The step that looks for benchmark items in what a benchmarked model was trained on: which rows those are, and what it writes."""

import json
import uuid
from pathlib import Path

import pytest

from infra.records import Given, Record
from infra.settings import Settings
from infra.store import Store, open_store
from tasks.contamination import (
    ContaminationConfig,
    contamination,
    find_training_rows,
    plan_contamination,
    read_contamination,
)
from tasks.step import Source
from tests.tasks.maker import BASE, Maker
from tests.tasks.test_gate_step import Folders, write_benchmark, write_training_rows
from training.config import Runtime

ITEM = "item {0} - what is {0} plus {0}, written out in " + "full " * 8


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}"}))


@pytest.fixture
def maker(store: Store, tmp_path: Path) -> Maker:
    return Maker(store, tmp_path)


def train_on(maker: Maker, rows: Record, base: Record | Given, *, seed: int = 0) -> Record:
    return maker.make("train", {"rows": rows, "base": base}, {"model.safetensors": ""}, config={"seed": seed})


def test_items_in_any_of_the_rows_are_hits_and_the_score_stands_beside_without_them(tmp_path: Path) -> None:
    inputs = {name: tmp_path / name for name in ("rows_0", "rows_1", "eval_gsm8k_part")}
    for folder in (*inputs.values(), tmp_path / "output"):
        folder.mkdir()
    write_training_rows(inputs["rows_0"], train=ITEM.format(4))
    write_training_rows(inputs["rows_1"], train=ITEM.format(7), heldout=ITEM.format(9))
    write_benchmark(inputs["eval_gsm8k_part"], [True, False] * 30)
    metrics = contamination.work(ContaminationConfig(), Folders(inputs, tmp_path / "output"))
    share, clean = (
        2 / 60,
        29 / 58,
    )  # documents 4, which is right, and 7, which is not; the held-out 9 was not trained on
    assert metrics == {
        "eval/gsm8k_part/in_training_data": pytest.approx(share),
        "eval/gsm8k_part/not_in_training_data": pytest.approx(clean),
    }
    (found,) = read_contamination(tmp_path / "output")
    assert [hit.doc_id for hit in found.samples] == ["4", "7"] and found.champion is None
    flags = json.loads((tmp_path / "output" / "summary.json").read_text())["flags"]
    assert "2 of 60 items (3.3%)" in flags["gsm8k_part"]


def test_a_policy_was_trained_on_its_rows_and_on_those_of_what_it_was_trained_from(store: Store, maker: Maker) -> None:
    first, second, other = (
        maker.make("ingest", {"source": BASE}, {"rows.parquet": name}, config={"n": name}) for name in "abc"
    )
    once = train_on(maker, first, Given(name="embedded:a", digest="aa" * 32))
    twice = train_on(maker, second, once)
    again = train_on(maker, second, twice, seed=1)
    train_on(maker, other, once)
    assert find_training_rows(store, f"train/{once.fingerprint}") == [f"ingest/{first.fingerprint}"]
    assert find_training_rows(store, f"train/{again.fingerprint}") == [
        f"ingest/{second.fingerprint}",
        f"ingest/{first.fingerprint}",
    ]
    store.delete(f"{second.prefix}/rows.parquet")
    assert find_training_rows(store, f"train/{twice.fingerprint}") == [f"ingest/{first.fingerprint}"], "what is left"


def test_rows_and_evaluations_are_its_identity_and_a_model_from_outside_has_none(
    store: Store, maker: Maker, s3: Settings, tmp_path: Path
) -> None:
    rows = maker.make("ingest", {"source": BASE}, {"rows.parquet": ""})
    model = train_on(maker, rows, BASE)
    measured = Source("evaluate/e", tmp_path, "e" * 64)

    def plan(name: str) -> dict[str, str] | None:
        given = Source(name, tmp_path, model.fingerprint)
        planned = plan_contamination(given, {"mmlu": measured}, store=store, settings=s3, runtime=Runtime())
        return planned.identity["inputs"] if planned else None

    assert plan(f"train/{model.fingerprint}") == {"rows_0": rows.fingerprint, "eval_mmlu": "e" * 64}
    assert plan("demo:tiny-policy") is None and plan(f"reward_model/{model.fingerprint}") is None
    assert plan("train/" + "0" * 64) is None
