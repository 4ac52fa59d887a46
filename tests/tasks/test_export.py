"""A model leaves the store as a folder that Hugging Face's libraries load, with a card that says what it is."""

import json
import uuid
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.alignment import Answers, measure
from evaluation.statistics import score_interval
from infra import records
from infra.records import Given, Record
from infra.settings import Settings
from infra.store import Store, StoreError, open_store
from tasks.candidate import promote_by_hand
from tasks.export import export, find_licence
from tests.tasks.maker import ITEMS, RESULT, SCORE, Maker


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}"}))


@pytest.fixture
def model(store: Store, tiny_policy: Path, tmp_path: Path) -> Record:
    """Return the record of a trained model with data, rewards and an evaluation, evaluated but not gated."""
    maker = Maker(store, tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "prefs.jsonl").write_text("{}")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Preferences | of [people]\n")
    data = Given(name=str(tmp_path / "hub" / "prefs.jsonl"), digest="da7a" * 16)
    rows = maker.make(
        "ingest", {"source": data}, {"rows.parquet": ""}, summary={"rows": 12, "quarantined_by_reason": {"empty": 1}}
    )
    scorer = Given(name="demo:tiny-reward-model", digest="5c0e" * 16)
    rewards = maker.make("score_rewards", {"rows": rows, "scorer": scorer}, {"scores.parquet": ""})
    files = {path.name: path.read_bytes() for path in tiny_policy.iterdir()}
    base = Given(name="embedded:minilm-l6-v2", digest="ba5e" * 16)
    trained = maker.make(
        "train",
        {"rows": rows, "base": base, "rewards": rewards},
        files | {"metrics.jsonl": "{}", "summary.json": "{}", "weights.parquet": ""},
        config={"objective": "var", "lambda_": 0.5, "seed": 1},
        summary={"lambda": 0.5, "final_loss": 2.5, "metrics": {"train/loss": 2.5}},
    )
    maker.make("evaluate", {"model": trained}, RESULT, config={"name": "mmlu_part"})
    served = {"name": "served_part", "endpoint": {"url": "http://a/v1", "model": "m"}}  # of what a server holds
    maker.make("evaluate", {"model": trained}, RESULT, config=served)
    return trained


def test_an_exported_model_loads_and_is_the_one_in_the_store(
    store: Store, model: Record, s3: Settings, tiny_policy: Path, tmp_path: Path
) -> None:
    promote_by_hand(store, "m", model, without_gate="a test")
    files = export(store, model, tmp_path / "out", settings=s3)
    assert "README.md" in files and not {"metrics.jsonl", "summary.json", "weights.parquet"} & set(files)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", tiny_policy))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("What is the capital of France?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**ids).logits, theirs(**ids).logits)
    assert [path.name for path in tmp_path.glob("out.partial-*")] == []


def test_the_card_says_what_the_model_is(store: Store, model: Record, s3: Settings, tmp_path: Path) -> None:
    promote_by_hand(store, "m", model, without_gate="for the | table")
    export(store, model, tmp_path / "out", settings=s3)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (
        head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation" and "var" in head["tags"]
    )
    low, high = score_interval([0, 1, 1, 1])
    for words in (
        f"`train/{model.fingerprint}`", records.digest_files(model), "at lambda = 0.5",
        f"| mmlu_part | acc | none | 75.0 | {100 * low:.1f} to {100 * high:.1f} | 4 | 0 | 0.4.13 |",
        "The gate has said nothing about this model.", "without the gate: for the \\| table",
        "Responses were scored by demo:tiny-reward-model.", "| rows | 12 |", "| quarantined_by_reason.empty | 1 |",
        "prefs.jsonl | cc-by-4.0 | `da7ada7ada7ada7a` |", "| demo:tiny-reward-model | apache-2.0 |",
        "| embedded:minilm-l6-v2 | not stated in its files |", "| ingest | `",
    ):  # fmt: skip
        assert words in card, words
    weights = next(file for file in model.files if file.name == "model.safetensors")
    assert f"| model.safetensors | `{weights.sha256}` |" in card
    assert "served_part" not in card
    assert "\n\n\n" not in card and "undefined" not in card.lower()


def answer(values: list[float]) -> Answers:
    """Return answers of four characters to as many prompts, none cut or empty."""
    rows = [f"row{n}" for n in range(len(values))]
    rewards = {row: [value] for row, value in zip(rows, values, strict=True)}
    return Answers(rewards, {row: [4] for row in rows}, truncated_share=0.5, empty_share=0.0, dropped=0)


def test_the_card_shows_rewards_and_win_rates_that_are_on_record(
    store: Store, model: Record, s3: Settings, tmp_path: Path
) -> None:
    (tmp_path / "said").mkdir()
    maker = Maker(store, tmp_path / "said")
    base = Given(name="demo:tiny-policy", digest="ba5e" * 16)
    ours, theirs, foreign = (
        maker.make("generate", {"policy": policy}, {"responses.parquet": ""}, config={"seed": seed})
        for seed, policy in enumerate((model, base, base))
    )
    scorer = Given(name="demo:tiny-reward-model", digest="5c0e" * 16)
    rewards = maker.make("score_rewards", {"rows": ours, "scorer": scorer}, {"scores.parquet": ""})
    given = {"answers": ours, "rewards": rewards, "baseline_answers": theirs}
    for seen, inputs, when in (
        ([0.0, 1.0, 2.0, 3.0], given, 3),
        ([7.0, 7.0], given, 2),
        ([9.0, 9.0], given | {"answers": foreign}, 4),
    ):
        found = measure("hha_helpful", answer(seen), answer([0.0] * len(seen)))
        files = {"alignment.json": found.model_dump_json()}
        told = {"benchmark": "hha_helpful", "flag": found.flag}
        maker.make(
            "alignment", inputs, files, summary=told, created=f"2026-01-0{when}T00:00:00+00:00", config={"n": when}
        )
    told = {
        "benchmark": "arena_hard",
        "judge": "j@1",
        "value": 0.25,
        "low": 0.125,
        "high": 0.5,
        "items": 9,
        "flag": None,
    }
    maker.make("judge", {"answers": ours}, {"scores.json": ""}, config={"baseline": "gpt-4-0314"}, summary=told)
    held = {"challenger_answers": ours, "champion_answers": theirs}
    maker.make("judge", held, {"scores.json": ""}, summary=told | {"benchmark": "heldout", "flag": "position: 40%"})
    maker.make("judge", {"answers": foreign}, {"scores.json": ""}, summary=told | {"value": 0.9})
    export(store, model, tmp_path / "out", settings=s3)
    card = (tmp_path / "out" / "README.md").read_text()
    gain = measure("x", answer([0.0, 1.0, 2.0, 3.0]), answer([0.0] * 4)).win_rate
    assert gain
    for words in (
        # 1.5 with a standard error of sqrt(5/3 / 4) and Student's 3.182 on 3 degrees of freedom
        "| hha_helpful | 4 | 1.500 | -0.554 to 3.554 | demo:tiny-reward-model | demo:tiny-policy | +1.500 [-0.554, +3.554] | 87.5 [",
        f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}] |",
        "| arena_hard | gpt-4-0314 | j@1 | 25.0 | 12.5 to 50.0 | 9 |",
        "| heldout | demo:tiny-policy | j@1 | 25.0 |",
        "Before you believe these:\n\n- hha_helpful: limit: 50% of the model's answers",
        "- heldout: position: 40%",
    ):
        assert words in card, words
    assert card.count("| hha_helpful |") == 1 and "| 90.0 |" not in card and "\n\n\n" not in card


def test_the_card_takes_a_verdict_by_its_seal_alone(store: Store, model: Record, s3: Settings, tmp_path: Path) -> None:
    (tmp_path / "judged").mkdir()
    maker = Maker(store, tmp_path / "judged")
    older = maker.judge(model, files={"verdict.json": '{"decision": "PROMOTE"}'}, created="2026-01-02T00:00:00+00:00")
    export(store, model, tmp_path / "first", settings=s3)
    assert f"`gate/{older.fingerprint}` was written by an older gate" in (tmp_path / "first" / "README.md").read_text()
    newer = maker.judge(model, config={"looks_spent": 1}, created="2026-01-03T00:00:00+00:00")
    varied = RESULT | {
        "samples.jsonl": json.dumps(ITEMS[0]),
        "scores.json": json.dumps([SCORE | {"value": 0.0, "n": 1}]),
    }
    other = {"name": "mmlu_part", "batch_size": 1}  # newer, and not what the verdict weighed
    maker.make("evaluate", {"model": model}, varied, config=other, created="2026-01-04T00:00:00+00:00")
    export(store, model, tmp_path / "second", settings=s3)
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"**PROMOTE** by `gate/{newer.fingerprint}`" in card and "| mmlu_part | acc | none | 75.0 |" in card
    store.put(f"{newer.prefix}/verdict.json", b"{}")
    with pytest.raises(ValueError, match="the verdict was changed"):
        export(store, model, tmp_path / "third", settings=s3)
    assert not list(tmp_path.glob("third*"))


def test_a_place_in_use_and_changed_weights_are_refused_and_nothing_is_left(
    store: Store, model: Record, s3: Settings, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="got a place in use, expected a new or empty folder"):
        export(store, model, tmp_path / "out", settings=s3)
    store.put(f"{model.prefix}/model.safetensors", b"other")
    with pytest.raises(StoreError, match=r"model\.safetensors: got SHA-256"):
        export(store, model, tmp_path / "elsewhere", settings=s3)
    assert not list(tmp_path.glob("elsewhere*")) and (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, "mit"),
        ({"README.md": "# A model\nNothing said.", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE.txt": "                                 Apache License\n        Version 2.0"}, "apache-2.0"),
        ({"README.md": "A model without one."}, None),
    ],
)
def test_a_licence_is_what_the_files_state(
    files: dict[str, str], licence: str | None, tmp_path: Path, s3: Settings
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(str(tmp_path), settings=s3) == licence


def test_the_interval_of_a_score_is_wilsons() -> None:
    """Wilson's interval of 3 in 4 at 95 %, from its formula by hand: (p + z²/2n ± z sqrt(p q / n + z²/4n²)) / (1 + z²/n)."""
    assert score_interval([0, 1, 1, 1]) == pytest.approx((0.30064, 0.95441), abs=1e-4)
    assert score_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert score_interval([0.5]) == (0.0, 1.0)
