"""The gate's decisions, its refusals, and how often it is wrong in simulation."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import statistics
from evaluation.config import GatePolicy
from evaluation.gate import compare_guard, compare_target, conclude, decide, write_verdict
from evaluation.result import BenchmarkResult, ScoreRow, diff_fields, read_result
from evaluation.verdict import Decision, GuardState, Verdict

PROFILE: dict[str, Any] = {
    "num_fewshot": 0,
    "limit": None,
    "generation": {"max_gen_toks": 64},
    "harness_version": "0.4.13",
}


def score_row(benchmark: str, *, value: float, n: int) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "task": benchmark,
        "metric": "acc",
        "filter": "none",
        "value": value,
        "stderr": 0.02,
        "n": n,
        "task_version": 1,
        "num_fewshot": 0,
        "decides": True,
        "harness_version": "0.4.13",
    }


def result(benchmark: str, correct: list[float], *, profile: dict[str, Any] | None = None) -> BenchmarkResult:
    row = ScoreRow.model_validate(score_row(benchmark, value=float(np.mean(correct)), n=len(correct)))
    items = {(benchmark, str(i)): float(value) for i, value in enumerate(correct)}
    return BenchmarkResult(benchmark=benchmark, scores=(row,), items=items, profile=profile or PROFILE)


def flip(n: int, *, right: int, won: int, lost: int) -> tuple[list[float], list[float]]:
    """Champion with `right` of n right; the challenger wins `won` of the wrong ones and loses `lost` of the right ones."""
    champion = [1.0] * right + [0.0] * (n - right)
    challenger = [0.0] * lost + [1.0] * (right - lost + won) + [0.0] * (n - right - won)
    return challenger, champion


def rewards(gain: float, *, n: int = 60, spread: float = 0.5) -> tuple[dict[str, float], dict[str, float]]:
    noise = np.random.default_rng(1).normal(0, spread, n)
    noise -= noise.mean()
    champion = {f"{i:032x}": float(i % 5) for i in range(n)}
    return {row: value + gain + float(noise[i]) for i, (row, value) in enumerate(champion.items())}, champion


def judge(
    guard: tuple[list[float], list[float]], *, gain: float = 0.5, margin: float = 0.05, same_model: bool = False
) -> Verdict:
    ours, theirs = rewards(gain)
    return decide(
        GatePolicy(margins={"mmlu": margin}),
        challenger=[result("mmlu", guard[0])],
        champion=[result("mmlu", guard[1])],
        rewards_challenger=ours,
        rewards_champion=theirs,
        same_model=same_model,
    )


def test_promotes_when_the_guard_holds_and_the_target_gains() -> None:
    verdict = judge(flip(1000, right=500, won=22, lost=20))
    assert verdict.decision is Decision.promote
    assert verdict.flags == ()
    guard = verdict.guards[0]
    assert (guard.n, guard.won, guard.lost, guard.discordance) == (1000, 22, 20, 0.042)
    assert guard.difference == pytest.approx(0.002)
    assert (guard.low, guard.high) == statistics.tango_interval(22, 20, n=1000, confidence=0.9)
    assert verdict.target.gain == pytest.approx(0.5)
    assert verdict.reasons == (verdict.target.reason, guard.reason)


def test_rejects_a_guard_shown_worse_than_its_margin_whatever_the_target() -> None:
    verdict = judge(flip(1000, right=500, won=5, lost=120), gain=5.0)
    assert verdict.decision is Decision.reject
    assert verdict.guards[0].state is GuardState.inferior
    assert "mmlu: shown worse than the margin of 5 points: 50.0 → 38.5 on 1000 items" in verdict.reasons[0]


def test_holds_an_undecided_guard_and_says_how_many_items_would_decide() -> None:
    verdict = judge(flip(100, right=50, won=5, lost=6))
    assert verdict.decision is Decision.hold
    guard = verdict.guards[0]
    assert guard.state is GuardState.undecided
    assert guard.items_to_decide is not None and guard.items_to_decide > 100
    assert f"about {guard.items_to_decide} items" in verdict.reasons[0]
    times = math.ceil(guard.items_to_decide / 100)
    assert (
        judge(flip(100 * times, right=50 * times, won=5 * times, lost=6 * times)).guards[0].state
        is GuardState.non_inferior
    )


def test_holds_without_a_shown_gain() -> None:
    guard = flip(1000, right=500, won=20, lost=20)
    small = judge(guard, gain=0.05)
    assert small.decision is Decision.hold
    assert small.target.prompts_to_decide is not None and small.target.prompts_to_decide > 60
    assert "heldout_reward: a gain is not shown" in small.reasons[0]
    loss = judge(guard, gain=-0.05)
    assert loss.decision is Decision.hold
    assert loss.target.prompts_to_decide is None


def test_challenger_equal_to_champion_holds() -> None:
    answers = flip(1000, right=500, won=0, lost=0)
    equal = {f"{i:032x}": float(i % 5) for i in range(60)}
    for same_model in (True, False):  # the same digest, and another digest with the same behaviour
        verdict = decide(
            GatePolicy(margins={"mmlu": 0.05}),
            challenger=[result("mmlu", answers[0])],
            champion=[result("mmlu", answers[1])],
            rewards_challenger=equal,
            rewards_champion=equal,
            same_model=same_model,
        )
        assert verdict.decision is Decision.hold
        assert not verdict.target.superior
    assert judge(flip(1000, right=500, won=20, lost=20), gain=5.0, same_model=True).decision is Decision.hold


def test_a_constant_gain_has_no_spread_and_is_not_believed() -> None:
    verdict = decide(
        GatePolicy(margins={}),
        challenger=[],
        champion=[],
        rewards_challenger={"a": 1.5, "b": 2.5},
        rewards_champion={"a": 1.0, "b": 2.0},
        same_model=False,
    )
    assert verdict.decision is Decision.hold
    assert any("without spread nothing can be shown" in flag for flag in verdict.flags)
    assert any("no benchmark is guarded" in flag for flag in verdict.flags)


def test_the_smallest_gain_moves_the_bar() -> None:
    ours, theirs = rewards(0.5)
    decisions = [
        decide(
            GatePolicy(margins={}, min_target_gain=minimum),
            challenger=[],
            champion=[],
            rewards_challenger=ours,
            rewards_champion=theirs,
            same_model=False,
        ).decision
        for minimum in (0.0, 0.3, 0.49)
    ]
    assert decisions == [Decision.promote, Decision.promote, Decision.hold]


def test_rows_of_one_prompt_count_once() -> None:
    ours, theirs = rewards(0.15, n=40)
    copies_ours = {f"{row}{k}": value for row, value in ours.items() for k in range(8)}
    copies_theirs = {f"{row}{k}": value for row, value in theirs.items() for k in range(8)}
    prompts = {f"{row}{k}": row for row in ours for k in range(8)}
    once, copied = (
        decide(
            GatePolicy(margins={}),
            challenger=[],
            champion=[],
            rewards_challenger=a,
            rewards_champion=b,
            same_model=False,
            prompts=p,
        ).target
        for a, b, p in ((ours, theirs, None), (copies_ours, copies_theirs, prompts))
    )
    assert copied.n == once.n == 40
    assert copied.p_value == pytest.approx(once.p_value)


def test_flags_margins_that_n_cannot_hold_and_zero_scores() -> None:
    verdict = judge(flip(8, right=0, won=0, lost=0))
    assert any(
        "8 items at discordance 0.000 can hold a margin of 41.1 points or more" in flag for flag in verdict.flags
    )
    assert any("both models scored 0 on all 8 items" in flag for flag in verdict.flags)
    assert any("8 items are few" in flag for flag in verdict.flags)
    assert verdict.decision is Decision.hold


def test_flags_limits_and_unguarded_benchmarks() -> None:
    limited = PROFILE | {"config": {"limit": 40}}
    ours, theirs = rewards(0.5)
    verdict = decide(
        GatePolicy(margins={}),
        challenger=[result("bbh", [1.0, 0.0], profile=limited)],
        champion=[result("bbh", [1.0, 1.0], profile=limited)],
        rewards_challenger=ours,
        rewards_champion=theirs,
        same_model=False,
    )
    assert any("bbh was measured and is not guarded" in flag for flag in verdict.flags)
    assert any("limited, and so no full score: bbh (40 items per task)" in flag for flag in verdict.flags)


def test_partial_credit_takes_a_paired_t_interval() -> None:
    draw = np.random.default_rng(0)
    champion = draw.uniform(0.2, 0.8, 200)
    challenger = champion + draw.normal(0.0, 0.05, 200)
    guard = compare_guard("judge", challenger, champion, margin=0.05, alpha=0.05)
    assert guard.method == "paired t interval"
    expected = statistics.paired_t(challenger - champion, alpha=0.05)
    assert (guard.low, guard.high) == (expected.low, expected.high)
    assert guard.state is GuardState.non_inferior
    still = compare_guard("judge", champion, champion, margin=0.05, alpha=0.05)
    assert still.state is GuardState.non_inferior and still.difference == 0


def test_verdict_survives_its_file(tmp_path: Path) -> None:
    verdict = judge(flip(100, right=50, won=5, lost=6))
    write_verdict(verdict, tmp_path / "verdict.json")
    assert Verdict.model_validate_json((tmp_path / "verdict.json").read_text()) == verdict


def test_unlike_profiles_are_refused_by_field() -> None:
    ours, theirs = rewards(0.5)
    other = PROFILE | {"generation": {"max_gen_toks": 256}}
    with pytest.raises(ValueError, match=r"mmlu: .*generation\.max_gen_toks is 256 and 64"):
        decide(
            GatePolicy(margins={"mmlu": 0.05}),
            challenger=[result("mmlu", [1.0, 0.0], profile=other)],
            champion=[result("mmlu", [1.0, 0.0])],
            rewards_challenger=ours,
            rewards_champion=theirs,
            same_model=False,
        )
    assert list(diff_fields({"a": 1}, {"b": 1})) == [("a", "1", "absent"), ("b", "absent", "1")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margins": {"mmlu": 0.05, "bbh": 0.05}}, "no result of the guarded bbh"),
        ({"margins": {"mmlu": 2.0}}, "above 0 and below 1"),
        (
            {"champion": [result("mmlu", [1.0, 0.0, 1.0])]},
            "0 of 2 are the challenger's alone and 1 of 3 the champion's",
        ),
        ({"champion": []}, "only the challenger has .'mmlu'."),
        ({"rewards_champion": {"a": 1.0}}, "1 of 2 are the challenger's alone and 0 of 1 the champion's alone"),
        ({"rewards_champion": {"a": 1.0, "b": math.nan}}, "not finite"),
        ({"rewards_challenger": {"a": 1.0}, "rewards_champion": {"a": 1.0}}, "at least 2 held-out prompts"),
        (
            {"rewards_challenger": {}, "rewards_champion": {}},
            "at least 2 held-out prompts are needed for an interval; got 0",
        ),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "margins": {"mmlu": 0.05},
        "challenger": [result("mmlu", [1.0, 0.0])],
        "champion": [result("mmlu", [1.0, 0.0])],
        "rewards_challenger": {"a": 1.0, "b": 2.0},
        "rewards_champion": {"a": 1.0, "b": 2.5},
        "same_model": False,
    } | change
    with pytest.raises(ValueError, match=message):
        decide(GatePolicy(margins=given.pop("margins")), **given)


def write_folder(
    folder: Path, *, value: float = 0.5, correct: tuple[Any, ...] = (True, False), decides: bool = True
) -> Path:
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps([score_row("mmlu", value=value, n=2) | {"decides": decides}]))
    lines = [{"task": "mmlu", "doc_id": i, "correct": c, "prompt": "?", "answer": "!"} for i, c in enumerate(correct)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    return folder


def test_reads_a_result_folder(tmp_path: Path) -> None:
    read = read_result(write_folder(tmp_path / "result"))
    assert (read.benchmark, read.score, read.profile) == ("mmlu", 0.5, PROFILE)
    assert read.items == {("mmlu", "0"): 1.0, ("mmlu", "1"): 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 0.75}, "scores.json says mmlu = 0.750000, its 2 items say 0.500000"),
        ({"correct": (True,)}, "cover 2 items and samples.jsonl has 1"),
        ({"correct": ()}, "has no items"),
        ({"correct": (True, 7)}, "line 2: a score of an item lies from 0 to 1; got 7"),
        ({"decides": False}, "cover 0 items"),
    ],
)
def test_refuses_a_folder_that_contradicts_itself(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_result(write_folder(tmp_path / "result", **change))


def test_names_the_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scores\.json, samples\.jsonl, profile\.json not there"):
        read_result(tmp_path)


# Simulation. Four guards of the sizes a small run has, one target; models that differ by chance alone.
GUARDS = {"mmlu": 570, "gsm8k": 250, "humaneval": 164, "bbh": 400}
RUNS = 2000


def simulate(
    *, guard_loss: dict[str, float], margins: dict[str, float], gain: float, seed: int, prompts: int = 100
) -> float:
    """Share of `RUNS` promotions when the true losses of the guards and the true gain of the target are as given."""
    draw = np.random.default_rng(seed)
    promoted = 0
    for _ in range(RUNS):
        guards = []
        for name, n in GUARDS.items():
            loss, psi = guard_loss[name], 0.1
            outcome = draw.choice(3, size=n, p=[1 - psi, (psi - loss) / 2, (psi + loss) / 2])
            challenger, champion = (outcome == 1).astype(float), (outcome == 2).astype(float)
            guards.append(compare_guard(name, challenger, champion, margin=margins[name], alpha=0.05))
        gains = draw.normal(gain, 1.0, prompts)
        target = compare_target("heldout_reward", gains, levels=(gain, 0.0), alpha=0.05, min_gain=0.0)
        promoted += conclude(tuple(guards), target=target, same_model=False)[0] is Decision.promote
    return promoted / RUNS


NO_LOSS = dict.fromkeys(GUARDS, 0.0)
HOLDABLE = {name: 1.15 * statistics.smallest_margin(n, discordance=0.1, alpha=0.05) for name, n in GUARDS.items()}


@pytest.mark.slow
def test_equal_models_are_promoted_no_more_often_than_alpha() -> None:
    assert simulate(guard_loss=NO_LOSS, margins=HOLDABLE, gain=0.0, seed=11) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("at_margin", list(GUARDS))
def test_a_guard_at_its_margin_is_promoted_no_more_often_than_alpha(at_margin: str) -> None:
    losses = NO_LOSS | {at_margin: HOLDABLE[at_margin]}
    assert simulate(guard_loss=losses, margins=HOLDABLE, gain=3.0, seed=12) <= 0.06


@pytest.mark.slow
def test_power_at_the_printed_detectable_gain() -> None:
    """Guards that lose nothing, with margins of twice what n can hold; the gain is the one the verdict prints."""
    gain = statistics.detectable_mean(100, sd=1.0, alpha=0.05)
    wide = {name: 2 * margin for name, margin in HOLDABLE.items()}
    assert simulate(guard_loss=NO_LOSS, margins=wide, gain=gain, seed=13) >= 0.78
