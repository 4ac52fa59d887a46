"""Identity of a judge's steps, without servers: what is judged by whom, never where it is, its key, or how fast."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.config import JudgeFlowConfig
from flows.judge import plan_judge
from flows.overrides import override
from infra.settings import Settings, read_settings
from tasks.execute import tell_endpoint
from tests.evaluation.arena_files import write_arena
from tests.flows.test_plan import NOWHERE

KEY = "sk-plan-0123"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return read_settings(home=tmp_path / "home", judge_url="http://127.0.0.1:9/v1", judge_api_key=KEY)


@pytest.fixture
def config(tmp_path: Path) -> JudgeFlowConfig:
    """Give the demo's tiny model on a small Arena-Hard."""
    write_arena(tmp_path / "files" / "arena-hard-v0.1")
    judging = {"benchmark": "arena_hard", "judge": {"kind": "endpoint", "model": "m", "revision": "1"}}
    values = {"judging": judging, "model": "demo:tiny-policy", "files": str(tmp_path / "files")}
    return JudgeFlowConfig.model_validate(values)


def fingerprints(config: JudgeFlowConfig, settings: Settings) -> dict[str, str]:
    return {step.title: step.fingerprint for step in plan_judge(config, store=NOWHERE, settings=settings)}


@pytest.mark.parametrize(
    ("change", "recomputed"),
    [
        ("judging.judge.revision=v2", {"judge · arena_hard"}),
        ("judging.judge.temperature=0.5", {"judge · arena_hard"}),
        ("judging.baseline=gpt-4-0613", {"judge · arena_hard"}),
        ("judging.format_retries=0", {"judge · arena_hard"}),
        ("answers.max_new_tokens=16", {"generate · arena_hard", "judge · arena_hard"}),
        ("runtime.concurrency=1", set()),
        ("runtime.max_calls=10", set()),
        ("runtime.patience_seconds=5", set()),
    ],
)
def test_what_a_change_recomputes(
    config: JudgeFlowConfig, settings: Settings, change: str, recomputed: set[str]
) -> None:
    before, after = fingerprints(config, settings), fingerprints(override(config, [change]), settings)
    assert list(before) == ["prompt_set · arena_hard", "generate · arena_hard", "judge · arena_hard"]
    assert {title for title in before if before[title] != after[title]} == recomputed


def test_where_the_endpoint_is_and_its_key_are_in_no_plan(config: JudgeFlowConfig, settings: Settings) -> None:
    moved = settings.model_copy(update={"judge_url": "https://elsewhere/v1", "judge_api_key": None})
    assert fingerprints(config, settings) == fingerprints(config, moved)
    steps = plan_judge(config, store=NOWHERE, settings=settings)
    told = [step.identity for step in steps], [step.runtime for step in steps], config.model_dump_json()
    assert KEY not in repr(told) and "127.0.0.1" not in repr(told)
    handed_over = [tell_endpoint(step.config, settings=settings) for step in steps]
    assert handed_over == ["", "", f"{KEY}\nhttp://127.0.0.1:9/v1\n"], "to the judge alone, on its standard input"
    with pytest.raises(ValueError, match="VARFLOW_JUDGE_URL: not set"):
        plan_judge(config, store=NOWHERE, settings=settings.model_copy(update={"judge_url": None}))


def test_a_local_judge_is_its_content(
    config: JudgeFlowConfig, settings: Settings, tiny_policy: Path, tmp_path: Path
) -> None:
    def planned(folder: Path) -> str:
        judged_by: dict[str, Any] = {"judge": {"kind": "local"}, "benchmark": "arena_hard"}
        changed = config.model_dump() | {"judging": judged_by, "judge_model": str(folder)}
        return fingerprints(JudgeFlowConfig.model_validate(changed), settings)["judge · arena_hard"]

    copy = tmp_path / "copy"
    shutil.copytree(tiny_policy, copy)
    assert planned(tiny_policy) == planned(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert planned(tiny_policy) != planned(copy), "weights swapped at the same place are another judge"


def test_a_part_is_answered_and_named_as_one(config: JudgeFlowConfig, settings: Settings) -> None:
    rows, answers, _ = plan_judge(override(config, ["judging.limit=2"]), store=NOWHERE, settings=settings)
    assert (rows.title, answers.title, answers.config.model_dump()["limit"]) == (
        "prompt_set · arena_hard",
        "generate · arena_hard_part",
        2,
    )
