"""What is on record of several models, chosen where it was measured of all of them alike: prompt sets and judges as benchmarks are."""

import io
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.comparison import compare
from infra.records import Given, Record
from infra.settings import Settings
from infra.store import Store, open_store
from infra.tracking import Tracking
from tasks.compare import ComparisonConfig, plan_comparison, read_subject
from tasks.step import Planned, Source
from tests.tasks.maker import RESULT, Maker

SCORER = Given(name="demo:tiny-reward-model", digest="5c0e" * 16)
FILES = Given(name="files", digest="f11e" * 16)


@pytest.fixture
def store(s3: Settings) -> Store:
    """Return a store under a prefix of its own."""
    return open_store(s3.model_copy(update={"s3_prefix": f"test-{uuid.uuid4().hex[:8]}"}))


@pytest.fixture
def maker(store: Store, tmp_path: Path) -> Maker:
    return Maker(store, tmp_path)


def table(**columns: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def score_set(
    maker: Maker, model: Record, rewards: list[float], *, limit: int | None = 3, scorer: Given = SCORER, **more: Any
) -> Record:
    """Make a model's rewards on hha_helpful, with the answers and the set behind them."""
    asked = maker.make(
        "prompt_set", {"raw": FILES}, {"rows.parquet": ""}, config={"name": "hha_helpful", "limit": limit}
    )
    config = {"max_new_tokens": more.pop("max_new_tokens", 6)}
    answers = maker.make("generate", {"rows": asked, "policy": model}, {"responses.parquet": ""}, config=config)
    rows = [f"row{n}" for n in range(len(rewards))]
    scores = {"scores.parquet": table(row_id=rows, reward=[[reward] for reward in rewards])}
    return maker.make("score_rewards", {"rows": answers, "scorer": scorer}, scores, **more)


def judge_answers(maker: Maker, model: Record, margins: dict[str, int], *, baseline: str = "gpt-4-0314") -> Record:
    """Make a judge's verdicts on a model's answers to two questions, the same in both orders."""
    asked = maker.make("prompt_set", {"raw": FILES}, {"rows.parquet": ""}, config={"name": "arena_hard", "limit": None})
    answers = maker.make("generate", {"rows": asked, "policy": model}, {"responses.parquet": ""}, config={"limit": 2})
    config = {"benchmark": "arena_hard", "limit": 2, "baseline": baseline, "judge": {"model": "j", "revision": "1"}}
    row = {"task": f"against {baseline}", "filter": "judge j@1", "metric": "win_rate", "decides": True}
    pairs = [{"doc_id": name, "ours_first": [m], "theirs_first": [m]} for name, m in margins.items()]
    files = {
        "scores.json": json.dumps([row]),
        "samples.jsonl": "\n".join(map(json.dumps, pairs)),
        "profile.json": json.dumps({"config": config}),
    }
    return maker.make("judge", {"answers": answers, "benchmark": FILES}, files, config=config)


def plan(store: Store, settings: Settings, *models: Record) -> Planned:
    tracking = Tracking("http://127.0.0.1:9")  # asked about runs alone
    named = tuple(f"train/{model.fingerprint}" for model in models)
    return plan_comparison(named, model=None, tokens=False, store=store, settings=settings, tracking=tracking)


def folders_of(planned: Planned, place: int) -> dict[str, Path]:
    given = {name.partition("_"): source for name, source in planned.inputs.items()}
    return {
        what: source.path for (at, _, what), source in given.items() if at == str(place) and isinstance(source, Source)
    }


def test_sets_and_judges_of_two_models_are_found_and_measured(store: Store, maker: Maker, s3: Settings) -> None:
    models = [maker.model(1), maker.model(2)]
    for place, model in enumerate(models):
        score_set(maker, model, [0.0 + place, 1.0, 2.0 + place])
        judge_answers(maker, model, {"q1": 2 - 4 * place, "q2": 1})
    maker.make("evaluate", {"model": models[0]}, RESULT, config={"name": "mmlu_part"})
    planned = plan(store, s3, *models)
    measured = {"judge_arena_hard_part", "set_hha_helpful_part"}
    assert planned.inputs.keys() == {"0_eval_mmlu_part"} | {f"{n}_{what}" for n in (0, 1) for what in measured}
    config = planned.config
    assert isinstance(config, ComparisonConfig)
    assert "measuring: hha_helpful_part" in config.subjects[0].cost
    found = compare([read_subject(one, folders_of(planned, place)) for place, one in enumerate(config.subjects)])
    (rewards,), (wins,) = found.alignment, found.judges
    assert (rewards.what, [level.value for level in rewards.levels]) == (
        "hha_helpful_part",
        [1.0, pytest.approx(5 / 3)],
    )
    assert (wins.what, [level.value for level in wins.levels]) == ("arena_hard_part", [1.0, 0.25])
    assert wins.detail == "win rate against gpt-4-0314, judge j@1"
    assert "mmlu_part: only of train/" in found.not_compared[0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"limit": 4}, "inputs.rows.inputs.rows.config.limit: 3 -> 4"),
        ({"max_new_tokens": 8}, "inputs.rows.config.max_new_tokens: 6 -> 8"),
        ({"scorer": Given(name="other", digest="07e7" * 16)}, "inputs.scorer: "),
        ({"config": {"max_tokens": 9}}, "config.max_tokens: "),
    ],
)
def test_rewards_that_were_measured_otherwise_are_refused_by_field_until_older_ones_are_alike(
    store: Store, maker: Maker, s3: Settings, changes: dict[str, Any], field: str
) -> None:
    models = [maker.model(1), maker.model(2)]
    score_set(maker, models[0], [0.0, 1.0])
    score_set(maker, models[1], [0.0, 1.0], **changes)
    with pytest.raises(
        ValueError, match="hha_helpful_part: scores of different profiles are never compared"
    ) as refused:
        plan(store, s3, *models)
    assert field in str(refused.value)
    alike = score_set(maker, models[1], [1.0, 2.0], created="2025-01-01T00:00:00+00:00")
    source = plan(store, s3, *models).inputs["1_set_hha_helpful_part"]
    assert source.fingerprint == alike.fingerprint


def test_judges_with_another_baseline_are_refused_and_a_whole_set_is_no_part_of_it(
    store: Store, maker: Maker, s3: Settings
) -> None:
    models = [maker.model(1), maker.model(2)]
    score_set(maker, models[0], [0.0, 1.0])
    score_set(maker, models[1], [0.0, 1.0], limit=None)
    planned = plan(store, s3, *models)
    assert planned.inputs.keys() == {"0_set_hha_helpful_part", "1_set_hha_helpful"}
    judge_answers(maker, models[0], {"q1": 1})
    judge_answers(maker, models[1], {"q1": 1}, baseline="gpt-4-0613")
    with pytest.raises(ValueError, match=r"arena_hard_part: .* config\.baseline: .*gpt-4-0314.* -> .*gpt-4-0613"):
        plan(store, s3, *models)


def test_three_models_alike_by_two_alone_are_refused_by_a_field(store: Store, maker: Maker, s3: Settings) -> None:
    models = [maker.model(n) for n in (1, 2, 3)]
    for model, limits in zip(models, ((3, 4), (3,), (4,)), strict=True):
        for limit in limits:
            score_set(maker, model, [0.0, 1.0], limit=limit)
    with pytest.raises(ValueError, match=r"inputs\.rows\.inputs\.rows\.config\.limit: (3 -> 4|4 -> 3)"):
        plan(store, s3, *models)
