"""The comparisons with TRL by reward: their statistics, and their whole path with TRL's own trainers on models of two layers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.reward_runs import Meter
from benchmarks.rewards import Sizes, compare_gains, compare_reward_gain, compare_targets, compare_with_grpo, race_grpo
from benchmarks.training import SHARED, Bench
from training.config import Precision
from training.model import load_policy

PREFERENCES = Path(__file__).parents[2] / "flows" / "demo" / "preferences.jsonl"


def test_the_ratio_of_gains_has_the_interval_that_many_prompts_and_seeds_give() -> None:
    draw = np.random.default_rng(0)
    shared_P = draw.normal(1.0, 0.5, size=400)  # what both gain on a prompt cancels in the ratio
    dpo_SP, var_SP = (factor * shared_P + draw.normal(0, 0.01, size=(3, 400)) for factor in (1.0, 1.5))
    found = compare_gains(var_SP, dpo_SP)
    assert found["var_vs_dpo_reward_gain"] == pytest.approx(1.5, abs=0.01)
    low, high = found["var_vs_dpo_reward_gain_ci"]
    assert low < found["var_vs_dpo_reward_gain"] < high
    assert high - low < 0.02  # unpaired, as if the gains were of different prompts, it would be 0.17


def test_the_interval_of_the_ratio_is_fiellers_at_95_percent() -> None:
    """Of seeds that all gain the same: the roots of (v - r d)^2 = z^2 Var(v - r d) by the prompts' own variances."""
    draw = np.random.default_rng(1)
    var_P, dpo_P = draw.normal(1.5, 2.0, size=300), draw.normal(1.0, 1.0, size=300)
    found = compare_gains(np.tile(var_P, (3, 1)), np.tile(dpo_P, (3, 1)))
    (vv, vd), (_, dd) = np.cov(var_P, dpo_P) / 300
    v, d, z = var_P.mean(), dpo_P.mean(), 1.959964
    low, high = sorted(np.roots([d**2 - z**2 * dd, -2 * (v * d - z**2 * vd), v**2 - z**2 * vv]).real)
    assert found["var_vs_dpo_reward_gain_ci"] == pytest.approx([low, high], abs=0.05 * (high - low))


def test_the_gain_of_many_prompts_has_its_standard_error() -> None:
    draw = np.random.default_rng(0)
    shared_P = draw.normal(1.0, 0.5, size=400)
    found = compare_gains(*(np.tile(factor * shared_P, (3, 1)) for factor in (1.5, 1.0)))
    assert found["reward_gain_dpo_se"] == pytest.approx(0.5 / 400**0.5, rel=0.1)


def test_there_is_no_ratio_to_a_gain_that_may_be_none() -> None:
    draw = np.random.default_rng(0)
    var_SP, dpo_SP = draw.normal(1.0, 1.0, size=(3, 100)), draw.normal(0.0, 1.0, size=(3, 100))
    found = compare_gains(var_SP, dpo_SP - dpo_SP.mean() + 0.01)
    assert found["var_vs_dpo_reward_gain"] is None
    assert found["var_vs_dpo_reward_gain_ci"] is None
    assert "DPO's gain of 0.0100" in found["var_vs_dpo_reward_gain_reason"]
    worse = compare_gains(var_SP, dpo_SP - 10.0)
    assert worse["var_vs_dpo_reward_gain"] is None  # significantly below the base is no gain either


def test_a_model_that_computes_activations_again_answers_as_it_does_without(
    tiny_policy: Path,
    tiny_reward_model: Path,
    tmp_path: Path,
    make_row: Callable[..., dict[str, Any]],
    write_rows: Callable[..., Path],
) -> None:
    """Its layers keep no keys and values while they train: every token behind the first would see itself alone."""
    rows = write_rows(tmp_path / "rows", [make_row(f"Why {n}?", ["A", "B"], split="heldout") for n in range(4)])
    heldout = {
        "rows": str(rows),
        "begin": 0,
        "end": 4,
        "scorer": str(tiny_reward_model),
        "temperature": 1.0,
        "new_tokens": 8,
    }
    meter = Meter(SHARED | {"model": str(tiny_policy), "folder": str(tmp_path), "heldout": heldout})
    model, _ = load_policy(tiny_policy, precision=Precision.float32, device=torch.device("cpu"))
    expected = meter.rewards(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert meter.rewards(model).tolist() == expected.tolist()
    assert model.training


@pytest.fixture
def bench(tiny_policy: Path, tiny_reward_model: Path, tmp_path: Path) -> Bench:
    """Return the comparisons on the rows that varflow ships, as small as they can be."""
    data = tmp_path / "data"
    (data / "helpful-base").mkdir(parents=True)
    shutil.copy(PREFERENCES, data / "helpful-base")
    sizes = Sizes(
        reward_epochs=1, longest_pair=900, longest_prompt=700, heldout_prompts=4, new_tokens=6, prompts=4, responses=2, batch_prompts=2, grpo_microbatches=(2, 4), target_gain=-1e6,
        var_epochs=1, pairs=16, target_prompts=8, gain_samples=16, dpo_microbatches=(1, 2), sweep_seconds=0.5, gain_seconds=0.5, tuning_prompts=2, final_prompts=4, answer_tokens=6, seeds=1,
        rates=(1e-3,), dpo_trials=((1e-3, 0.1),), var_trials=((1e-3, 2),),
    )  # fmt: skip
    paths = {"model": str(tiny_policy), "encoder": str(tiny_reward_model), "data": str(data)}
    return Bench(SHARED | paths | {"steps": 1}, tmp_path / "scratch", talk=False, sizes=sizes)


@pytest.mark.slow
def test_a_race_against_grpo_to_its_end_and_to_its_limit(bench: Bench) -> None:
    found = compare_with_grpo(bench)
    assert found["grpo_reward_target"] < found["grpo_reward_base"]  # so that the first look at each ends the race
    assert found["var_vs_grpo_time_to_reward"] == pytest.approx(found["grpo_seconds"] / found["grpo_var_seconds"])
    assert found["var_vs_grpo_time_to_reward_censored"] is False
    assert found["grpo_var_seconds"] > found["grpo_var_sampling_seconds"] > 0
    assert found["grpo_steps"] >= 1
    (var_phases,) = found["grpo_var_phases"].values()
    for phases, seconds in ((found["grpo_phases"], "grpo_seconds"), (var_phases, "grpo_var_seconds")):
        assert sum(phases.values()) == pytest.approx(found[seconds], abs=0.05 * len(phases))
        assert phases["sample"] > 0
    assert set(var_phases) == {"sample", "score", "prepare", "steps", "rest"}
    assert set(found["grpo_phases"]) == {"prepare", "sample", "score", "forward", "rest"}
    assert list(found["grpo_sweep_seconds"]) == [2, 4] and found["grpo_microbatch"] in (2, 4)
    kept = {path: path.stat().st_mtime_ns for path in bench.scratch.glob("*/found.json")}
    assert compare_with_grpo(bench) == found
    assert {path: path.stat().st_mtime_ns for path in bench.scratch.glob("*/found.json")} == kept

    spec = json.loads(
        next(json.loads(path.read_text())["key"] for path in kept if path.parent.name.startswith("grpo-"))
    )
    tried = ("kind", "steps", "learning_rate", "microbatch", "tuned", "limit", "target")
    common = {name: spec[name] for name in spec if name not in tried}
    censored = race_grpo(bench, var_seconds=0.2, common=common | {"target": 1e6})
    assert censored["var_vs_grpo_time_to_reward_censored"] is True
    assert censored["var_vs_grpo_time_to_reward"] >= 10
    assert censored["grpo_seconds"] >= 2.0


@pytest.mark.slow
def test_what_there_is_to_learn_by_the_number_of_responses(bench: Bench) -> None:
    bench.sizes = replace(bench.sizes, target_responses=(2, 4), target_lambdas=(1e-6, 0.5))
    found = compare_targets(bench)["reward_targets_by_responses"]
    assert list(found) == [2, 4] and found[4]["seconds"] == pytest.approx(2 * found[2]["seconds"])
    for count in (2, 4):
        assert found[count]["gain_by_lambda"][1e-6] == pytest.approx(found[count]["gain_of_the_best"])
        assert found[count]["gain_by_lambda"][0.5] != 0


@pytest.mark.slow
def test_gains_over_the_base_at_equal_time(bench: Bench) -> None:
    found = compare_reward_gain(bench)
    assert ("var_vs_dpo_reward_gain_reason" in found) == (found["var_vs_dpo_reward_gain"] is None)
    assert {name: len(seconds) for name, seconds in found["reward_gain_seconds"].items()} == {"dpo": 1, "var": 1}
    for method in ("dpo", "var"):
        assert min(found["reward_gain_seconds"][method]) >= 0.5
    assert min(found["reward_gain_pairs_dpo"] + found["reward_gain_prompts_var"]) >= 8
    assert found["reward_gain_var_se"] > 0
    (target,) = found["reward_gain_targets_var"]
    assert target["samples"] != target["weighted"] != target["best"]
    # Sampling and scoring are in VAR's time: where they alone take longer than there is, one step is left.
    keys = [json.loads(json.loads(path.read_text())["key"]) for path in bench.scratch.glob("var_gain-*/found.json")]
    spec = {name: value for name, value in keys[0].items() if name not in ("kind", "steps", *SHARED)}
    late = bench.measure("var_gain", **spec | {"samples": spec["samples"] | {"seconds": 1000.0}})
    assert late["seconds"] > 1000 and late["prompts"] == 8
