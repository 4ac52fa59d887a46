"""The gate's decisions, its refusals, and how often it is wrong in simulation."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics
from evaluation.config import BenchmarkConfig, GatePolicy, Look, SuiteConfig
from evaluation.gate.decide import Evidence, conclude, decide, flag_target, measure_noise, write_verdict
from evaluation.gate.policy import check_names, count_items, flag_policy
from evaluation.gate.verdict import (
    BoundState,
    Decision,
    GuardState,
    OlderVerdictError,
    Verdict,
    check_inputs,
    compute_seal,
    read_verdict,
)
from evaluation.gate.weigh import Pairs, adjust_targets, compare_benchmark, compare_guard, pair_scores
from evaluation.harness.result import BenchmarkResult, ScoreRow, diff_fields, read_result
from flows.recipes import read_recipe

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


def weigh(
    policy: GatePolicy,
    *,
    challenger: tuple[BenchmarkResult, ...] = (),
    champion: tuple[BenchmarkResult, ...] = (),
    rewards_challenger: dict[str, float],
    rewards_champion: dict[str, float],
    lengths: tuple[dict[str, float], dict[str, float]] | None = None,
    same_model: bool = False,
    **more: Any,
) -> Verdict:
    """Decide on models whose answers are equally long, unless lengths are given."""
    equal = {row: 80.0 for row in rewards_challenger}, {row: 80.0 for row in rewards_champion}
    ours, theirs = lengths or equal
    return decide(
        policy,
        challenger=Evidence(challenger, rewards_challenger, ours, parameters=10**9),
        champion=Evidence(champion, rewards_champion, theirs, parameters=10**9),
        same_model=same_model,
        **more,
    )


def judge(
    guard: tuple[list[float], list[float]], *, gain: float = 0.5, margin: float = 0.05, same_model: bool = False,
    policy: dict[str, Any] | None = None, **more: Any,
) -> Verdict:  # fmt: skip
    ours, theirs = rewards(gain)
    return weigh(
        GatePolicy(**{"margins": {"mmlu": margin}} | (policy or {})),
        challenger=(result("mmlu", guard[0]),),
        champion=(result("mmlu", guard[1]),),
        rewards_challenger=ours,
        rewards_champion=theirs,
        same_model=same_model,
        **more,
    )


def test_promotes_when_the_guard_holds_and_the_target_gains() -> None:
    verdict = judge(flip(1000, right=500, won=22, lost=20))
    assert verdict.decision is Decision.promote
    assert verdict.flags == ()
    guard = verdict.guards[0]
    assert (guard.n, guard.won, guard.lost, guard.discordance) == (1000, 22, 20, 0.042)
    assert guard.difference == pytest.approx(0.002)
    assert (guard.low, guard.high) == statistics.tango_interval(22, 20, n=1000, confidence=0.9)
    (target,) = verdict.targets
    assert target.gain == pytest.approx(0.5)
    assert verdict.reasons == (target.reason, guard.reason, verdict.growths[0].reason)


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
    assert small.targets[0].more_to_decide is not None and small.targets[0].more_to_decide > 60
    assert "heldout_reward: a gain is not shown" in small.reasons[0]
    loss = judge(guard, gain=-0.05)
    assert loss.decision is Decision.hold
    assert loss.targets[0].more_to_decide is None


def test_challenger_equal_to_champion_holds() -> None:
    answers = flip(1000, right=500, won=0, lost=0)
    equal = {f"{i:032x}": float(i % 5) for i in range(60)}
    for same_model in (True, False):  # the same digest, and another digest with the same behaviour
        verdict = weigh(
            GatePolicy(margins={"mmlu": 0.05}),
            challenger=(result("mmlu", answers[0]),),
            champion=(result("mmlu", answers[1]),),
            rewards_challenger=equal,
            rewards_champion=equal,
            same_model=same_model,
        )
        assert verdict.decision is Decision.hold
        assert not verdict.targets[0].superior
    assert judge(flip(1000, right=500, won=20, lost=20), gain=5.0, same_model=True).decision is Decision.hold


def test_a_constant_gain_has_no_spread_and_is_not_believed() -> None:
    verdict = weigh(
        GatePolicy(margins={}),
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
        weigh(
            GatePolicy(margins={}, targets={"heldout_reward": minimum}),
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
        weigh(
            GatePolicy(margins={}),
            rewards_challenger=a,
            rewards_champion=b,
            same_model=False,
            prompts=p,
        ).targets[0]
        for a, b, p in ((ours, theirs, None), (copies_ours, copies_theirs, prompts))
    )
    assert copied.n == once.n == 40
    assert copied.p_value == pytest.approx(once.p_value)
    for named, message in (
        ({"other": "p"}, "40 of 40 rows have a reward and no prompt"),
        (dict.fromkeys(ours, "p"), "got 1 in 40"),
    ):
        with pytest.raises(ValueError, match=message):
            weigh(GatePolicy(margins={}), rewards_challenger=ours, rewards_champion=theirs, prompts=named)


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
    verdict = weigh(
        GatePolicy(margins={}),
        challenger=(result("bbh", [1.0, 0.0], profile=limited),),
        champion=(result("bbh", [1.0, 1.0], profile=limited),),
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
    guard = compare_guard("judge", pair_scores(challenger, champion), margin=0.05, alpha=0.05)
    assert guard.method == "paired t interval"
    expected = statistics.paired_t(challenger - champion, alpha=0.05)
    assert (guard.low, guard.high) == (expected.low, expected.high)
    assert guard.state is GuardState.non_inferior
    still = compare_guard("judge", pair_scores(champion, champion), margin=0.05, alpha=0.05)
    assert still.state is GuardState.non_inferior and still.difference == 0


def test_verdict_survives_its_file(tmp_path: Path) -> None:
    verdict = judge(flip(100, right=50, won=5, lost=6))
    write_verdict(verdict, tmp_path / "verdict.json")
    assert Verdict.model_validate_json((tmp_path / "verdict.json").read_text()) == verdict


def test_unlike_profiles_are_refused_by_field() -> None:
    ours, theirs = rewards(0.5)
    other = PROFILE | {"generation": {"max_gen_toks": 256}}
    with pytest.raises(ValueError, match=r"mmlu: .*generation\.max_gen_toks is 256 and 64"):
        weigh(
            GatePolicy(margins={"mmlu": 0.05}),
            challenger=(result("mmlu", [1.0, 0.0], profile=other),),
            champion=(result("mmlu", [1.0, 0.0]),),
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
            {"champion": (result("mmlu", [1.0, 0.0, 1.0]),)},
            "0 of 2 are the challenger's alone and 1 of 3 the champion's",
        ),
        ({"champion": ()}, "only the challenger has .'mmlu'."),
        ({"rewards_champion": {"a": 1.0}}, "1 of 2 are the challenger's alone and 0 of 1 the champion's alone"),
        (
            {"rewards_champion": {"a": 1.0, "b": math.nan}},
            r"1 of 2 held-out rewards of the champion are not finite \(first: row b\)",
        ),
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
        "challenger": (result("mmlu", [1.0, 0.0]),),
        "champion": (result("mmlu", [1.0, 0.0]),),
        "rewards_challenger": {"a": 1.0, "b": 2.0},
        "rewards_champion": {"a": 1.0, "b": 2.5},
        "same_model": False,
    } | change
    with pytest.raises(ValueError, match=message):
        weigh(GatePolicy(margins=given.pop("margins")), **given)


def test_any_of_several_targets_is_adjusted_by_holm() -> None:
    guard = flip(1000, right=500, won=70, lost=48)  # mid-p McNemar 0.021 for one target named beforehand
    named = judge(guard, gain=0.05, policy={"targets": {"mmlu": 0.0}})
    assert named.decision is Decision.promote
    (target,) = named.targets
    assert (target.method, target.unit) == ("mid-p McNemar", "items")
    assert target.p_value == target.p_adjusted == statistics.mcnemar_midp(70, 48) < 0.05
    assert (target.low, target.high) == statistics.tango_interval(70, 48, n=1000, confidence=0.9)
    either = judge(guard, gain=0.05, policy={"targets": {"heldout_reward": 0.0, "mmlu": 0.0}})
    reward, score = either.targets
    assert reward.p_value > 0.05 and not reward.superior
    assert score.p_adjusted == pytest.approx(2 * score.p_value) and score.superior == (2 * score.p_value <= 0.05)
    assert either.decision is Decision.promote and either.reasons[0] == score.reason and "Holm" in score.reason
    weaker = judge(
        flip(1000, right=500, won=68, lost=48), gain=0.05, policy={"targets": {"heldout_reward": 0.0, "mmlu": 0.0}}
    )
    assert weaker.targets[1].p_value <= 0.05 < weaker.targets[1].p_adjusted
    assert weaker.decision is Decision.hold
    z = statistics.score_statistic(68, 48, n=1000, difference=0.0)
    more = weaker.targets[1].more_to_decide
    assert more == statistics.items_to_decide(z, n=1000, alpha=0.025) and more is not None and more > 1000
    assert f"about {more} items at these rates would show it" in weaker.targets[1].reason
    assert weaker.targets[0].more_to_decide == statistics.items_to_decide(
        weaker.targets[0].statistic or 0.0, n=60, alpha=0.025, student=True
    )
    assert {target.reason for target in weaker.targets} <= set(weaker.reasons)


def test_a_target_without_spread_makes_no_other_one_easier() -> None:
    """Holm would ask half as much of the second if the first, of which nothing can be estimated, were taken to be shown."""
    ours = {f"{i:032x}": float(i % 5) + 1.0 for i in range(60)}
    challenger, champion = flip(1000, right=500, won=68, lost=48)
    verdict = weigh(
        GatePolicy(margins={}, targets={"heldout_reward": 0.0, "mmlu": 0.0}),
        challenger=(result("mmlu", challenger),),
        champion=(result("mmlu", champion),),
        rewards_challenger=ours,
        rewards_champion={row: value - 1.0 for row, value in ours.items()},
    )
    reward, score = verdict.targets
    assert reward.p_value == 1 and score.p_adjusted == pytest.approx(2 * score.p_value) and not score.superior


def test_a_task_that_is_all_won_beside_one_that_is_all_alike_is_a_gain() -> None:
    challenger, champion = [1.0] * 20 + [0.0] * 20, [0.0] * 40
    strata = np.repeat([0, 1], 20)
    target = compare_benchmark(
        "mmlu", Pairs(np.array(challenger), np.array(champion), strata), alpha=0.05, min_gain=0.0
    )
    (target,) = adjust_targets([target], alpha=0.05)
    assert target.superior and target.p_value == statistics.mcnemar_midp(20, 0) and flag_target(target) == []
    alike = compare_benchmark("mmlu", pair_scores(np.array(champion), np.array(champion)), alpha=0.05, min_gain=0.0)
    assert not alike.superior and "without spread nothing can be shown" in flag_target(alike)[0]


def test_the_gain_that_would_be_promoted_reckons_with_the_guards() -> None:
    guard = flip(1000, right=500, won=50, lost=50)
    tight, wide, hopeless = (judge(guard, margin=margin).targets[0] for margin in (0.029, 0.2, 0.01))
    assert wide.promotable_gain == statistics.round_up(wide.detectable_gain)  # the guard passes in all but every run
    assert tight.promotable_gain is not None and wide.promotable_gain is not None
    assert tight.promotable_gain > wide.promotable_gain
    assert f"a true gain of {tight.promotable_gain:.4g} would be promoted 4 times in 5" in tight.reason
    assert hopeless.promotable_gain is None  # equal models pass this guard less often than 4 times in 5


def test_a_target_with_a_least_gain_takes_the_score_test() -> None:
    guard = flip(1000, right=500, won=120, lost=40)  # +8 points
    reached, missed = (judge(guard, policy={"targets": {"mmlu": gain}}).targets[0] for gain in (0.05, 0.07))
    assert reached.method == "Tango score test" and reached.superior and not missed.superior
    z = statistics.score_statistic(120, 40, n=1000, difference=0.05)
    assert stats.norm.sf(z) == pytest.approx(reached.p_value)


@pytest.mark.parametrize(
    ("right", "state", "decision"),
    [
        (300, BoundState.kept, Decision.promote),
        (255, BoundState.undecided, Decision.hold),
        (180, BoundState.broken, Decision.reject),
    ],
)
def test_a_floor_has_to_be_shown_to_hold(right: int, state: BoundState, decision: Decision) -> None:
    verdict = judge(flip(1000, right=right, won=20, lost=20), policy={"floors": {"mmlu": 0.25}})
    assert (verdict.floors[0].state, verdict.decision) == (state, decision)
    floor = verdict.floors[0]
    assert (floor.low, floor.high) == statistics.wilson_interval(right, n=1000, confidence=0.9)
    assert ("items at these rates would decide it" in floor.reason) == (state is BoundState.undecided)
    assert decision is Decision.promote or floor.reason in verdict.reasons


def test_a_floor_of_the_reward_is_tested_over_prompts() -> None:
    levels = [
        judge(flip(1000, right=500, won=20, lost=20), policy={"floors": {"heldout_reward": f}}) for f in (1.0, 9.0)
    ]
    assert [verdict.decision for verdict in levels] == [Decision.promote, Decision.reject]
    assert "heldout_reward: shown below its floor of 9: 2.500 over 60 prompts" in levels[1].reasons[0]


def grow(factor: float, *, slope: float, gain: float, seed: int = 0) -> Verdict:
    """The verdict on answers longer by a factor, whose reward rises by `slope` with each character and by `gain` besides."""
    draw = np.random.default_rng(seed)
    rows = [f"{i:032x}" for i in range(200)]
    before_N = draw.uniform(60, 140, 200)
    after_N = before_N * draw.normal(factor, 0.2 * factor, 200)
    gain_N = gain + slope * (after_N - before_N) + draw.normal(0, 0.3, 200)
    return weigh(
        GatePolicy(margins={}),
        rewards_challenger=dict(zip(rows, gain_N.tolist(), strict=True)),
        rewards_champion=dict.fromkeys(rows, 0.0),
        lengths=(dict(zip(rows, after_N.tolist(), strict=True)), dict(zip(rows, before_N.tolist(), strict=True))),
    )


def test_a_gain_that_only_length_bought_is_held() -> None:
    hacked, honest, short = (
        grow(2.0, slope=0.02, gain=0.0),
        grow(2.0, slope=0.0, gain=0.5),
        grow(1.2, slope=0.02, gain=0.0),
    )
    assert hacked.targets[0].superior and hacked.decision is Decision.hold
    (length,) = hacked.growths
    assert length.state is BoundState.broken and length.growth == pytest.approx(1.0, abs=0.1)
    assert (
        "length: shown to grow by more than 50 %" in hacked.reasons[0]
        and "at equal length no gain" in hacked.reasons[0]
    )
    assert honest.growths[0].state is BoundState.broken and honest.decision is Decision.promote
    assert honest.growths[0].gain_at_equal_length == pytest.approx(0.5, abs=0.2)
    assert short.growths[0].state is BoundState.kept and short.decision is Decision.promote


def test_a_gain_that_length_bought_stops_no_promotion_by_another_target() -> None:
    challenger, champion = flip(1000, right=500, won=120, lost=40)
    long = {f"{i:032x}": 200.0 + i % 7 for i in range(60)}, {f"{i:032x}": 80.0 + i % 5 for i in range(60)}
    verdicts = [
        judge((challenger, champion), policy={"targets": targets}, lengths=long)
        for targets in ({"heldout_reward": 0.0}, {"heldout_reward": 0.0, "mmlu": 0.0})
    ]
    bought = [conclude_as_bought(verdict) for verdict in verdicts]
    assert [decision for decision, _ in bought] == [Decision.hold, Decision.promote]
    assert bought[0][1] == (verdicts[0].growths[0].reason,)
    assert bought[1][1][0] == verdicts[1].targets[1].reason


def conclude_as_bought(verdict: Verdict) -> tuple[Decision, tuple[str, ...]]:
    """What the gate concludes from a verdict's parts if length explains the whole gain."""
    growths = [growth.model_copy(update={"holds": False}) for growth in verdict.growths]
    return conclude(
        verdict.guards, targets=verdict.targets, growths=growths, looks=verdict.looks, same_model=verdict.same_model
    )


@pytest.mark.parametrize(("after", "state"), [(0.0, BoundState.kept), (9.0, BoundState.broken)])
def test_a_champion_that_answers_nothing_is_no_error_and_no_growth(after: float, state: BoundState) -> None:
    ours, theirs = rewards(0.5)
    lengths = dict.fromkeys(ours, after), dict.fromkeys(theirs, 0.0)
    (length,) = weigh(GatePolicy(margins={}), rewards_challenger=ours, rewards_champion=theirs, lengths=lengths).growths
    assert (length.state, length.growth) == (state, None)
    assert "the champion's are all empty" in length.reason


def test_cost_is_bounded_by_parameters_times_characters() -> None:
    ours, theirs = rewards(0.5)
    lengths = {row: 80.0 + i % 9 for i, row in enumerate(ours)}
    verdicts = [
        decide(
            GatePolicy(margins={}, max_cost_growth=0.2),
            challenger=Evidence(rewards=ours, lengths=lengths, parameters=size),
            champion=Evidence(rewards=theirs, lengths=lengths, parameters=10**9),
            same_model=False,
        )
        for size in (10**9, 2 * 10**9)
    ]
    assert [verdict.decision for verdict in verdicts] == [Decision.promote, Decision.hold]
    assert verdicts[1].growths[1].growth == pytest.approx(1.0)
    assert "cost: shown to grow by more than 20 %" in verdicts[1].reasons[0]
    with pytest.raises(ValueError, match="number of the models' parameters was not given"):
        decide(
            GatePolicy(margins={}, max_cost_growth=0.2),
            challenger=Evidence(rewards=ours, lengths=lengths),
            champion=Evidence(rewards=theirs, lengths=lengths),
            same_model=False,
        )


def test_looks_share_the_years_error_and_end_with_it() -> None:
    guard, plan = flip(1000, right=500, won=22, lost=20), {"planned_looks": 10}
    first = judge(guard, policy=plan)
    assert first.alpha == pytest.approx(0.005) and first.guards[0].confidence == pytest.approx(0.99)
    assert "at 99%" in first.guards[0].reason
    assert (first.guards[0].low, first.guards[0].high) == statistics.tango_interval(22, 20, n=1000, confidence=0.99)
    planned = Look(alpha=0.005, planned=True)
    last, spent = (judge(guard, policy=plan, looks=[planned] * before) for before in (9, 10))
    assert (
        last.decision is Decision.promote and last.flags == () and last.looks.chance == pytest.approx(0.0489, abs=1e-4)
    )
    assert spent.decision is Decision.hold and spent.flags == ()
    assert spent.reasons[0].startswith(
        "planned looks of this year have spent 0.05 of its error of 0.05, and one of 10 would take 0.005"
    )


def test_a_year_that_is_planned_anew_has_no_more_error_than_it_had() -> None:
    guard, whole = flip(1000, right=500, won=22, lost=20), Look(alpha=0.05, planned=True)
    assert judge(guard, policy={"planned_looks": 12}, looks=[whole]).decision is Decision.hold
    fewer = [Look(alpha=0.05 / 12, planned=True)] * 4  # a third of the year; two of four more are two thirds
    four = [
        judge(guard, policy={"planned_looks": 4}, looks=[*fewer, *more])
        for more in ([], [Look(alpha=0.0125, planned=True)] * 3)
    ]
    assert [verdict.decision for verdict in four] == [Decision.promote, Decision.hold]


def test_looks_that_nobody_planned_are_flagged_with_what_they_come_to() -> None:
    guard, unplanned = flip(1000, right=500, won=22, lost=20), Look(alpha=0.05, planned=False)
    assert judge(guard).flags == ()
    (flag,) = judge(guard, looks=[unplanned] * 51).flags
    assert "look 52 of the year" in flag and "up to 93.1 %" in flag
    after = judge(guard, policy={"planned_looks": 10}, looks=[unplanned])  # of no plan, and so not of the planned error
    assert after.decision is Decision.promote and "up to 5.48 %, and not 5 %" in after.flags[0]


def test_the_audit_split_never_decides_and_is_reported() -> None:
    guard = flip(1000, right=500, won=22, lost=20)
    verdict = judge(guard, policy={"audit_share": 0.25})
    mmlu, reward = verdict.audit
    assert (mmlu.name, mmlu.unit, reward.name, reward.unit) == ("mmlu", "items", "heldout_reward", "prompts")
    assert mmlu.n + verdict.guards[0].n == 1000 and 200 < mmlu.n < 300
    assert reward.n + verdict.targets[0].n == 60
    assert mmlu.agrees
    # What only the audit split shows changes no decision.
    ours, theirs = rewards(0.5)
    kept = {row for row in ours if int.from_bytes(hashlib.sha256(row.encode()).digest()[:8], "big") / 2**64 >= 0.25}
    twisted = {row: value if row in kept else -99.0 for row, value in ours.items()}
    lost = weigh(GatePolicy(margins={}, audit_share=0.25), rewards_challenger=twisted, rewards_champion=theirs)
    assert lost.decision is Decision.promote and not lost.audit[0].agrees
    with pytest.raises(ValueError, match=r"an audit share of 0\.01 puts . of 60 held-out prompts aside"):
        weigh(GatePolicy(margins={}, audit_share=0.01), rewards_challenger=ours, rewards_champion=theirs)


def test_the_noise_floor_stands_beside_the_guard_and_warns() -> None:
    runs = [result("mmlu", flip(100, right=50, won=0, lost=lost)[0], profile={"seed": lost}) for lost in (0, 3, 6)]
    noise = measure_noise(runs, varied="few-shot seed")
    assert (noise.varied, noise.runs) == ("few-shot seed", 3)
    assert (noise.flip_rate, noise.max_difference) == pytest.approx((0.04, 0.06))
    still = measure_noise([runs[0], runs[0]], varied="batch size")
    verdict = judge(flip(1000, right=500, won=22, lost=20), noise={"mmlu": [noise, still]})
    assert verdict.noise == {"mmlu": (noise, still)}
    (flag,) = (flag for flag in verdict.flags if "within that noise" in flag)
    assert "3 runs of the champion alone that vary few-shot seed differ by up to 6.0 points" in flag
    assert "the difference of +0.2 or the margin of 5" in flag
    target = judge(flip(1000, right=500, won=90, lost=50), policy={"targets": {"mmlu": 0.0}}, noise={"mmlu": [noise]})
    assert [f for f in target.flags if "within that noise" in f and "difference of +4.0 is" in f]
    with pytest.raises(ValueError, match="one benchmark and the same items"):
        measure_noise([runs[0], result("bbh", [1.0])], varied="batch size")


def test_the_mean_is_of_the_four_in_full_and_of_nothing_less() -> None:
    sizes = {"mmlu": 900, "gsm8k": 400, "humaneval": 164, "bbh": 500}
    sides = [
        tuple(
            result(name, flip(n, right=n // 2, won=n // 20, lost=n // 20)[side], profile=profile)
            for name, n in sizes.items()
        )
        for side in (0, 1)
        for profile in (PROFILE,)
    ]
    ours, theirs = rewards(0.5)
    policy = GatePolicy(margins=dict.fromkeys(sizes, 0.1))
    verdict = weigh(policy, challenger=sides[0], champion=sides[1], rewards_challenger=ours, rewards_champion=theirs)
    assert verdict.mean is not None and verdict.mean.difference == pytest.approx(0)
    assert verdict.mean.champion == pytest.approx(0.5)
    expected = statistics.detectable_average(
        [sizes[name] for name in sorted(sizes)],
        discordances=[2 * (sizes[name] // 20) / sizes[name] for name in sorted(sizes)], alpha=0.05,
    )  # fmt: skip
    assert verdict.mean.detectable_difference == pytest.approx(expected)
    part = GatePolicy(margins=dict.fromkeys(("mmlu", "bbh", "gsm8k"), 0.1))
    fewer = [side[:2] + side[3:] for side in sides]
    assert (
        weigh(part, challenger=fewer[0], champion=fewer[1], rewards_challenger=ours, rewards_champion=theirs).mean
        is None
    )


def test_tasks_of_a_benchmark_are_its_strata() -> None:
    challenger, champion = flip(300, right=150, won=15, lost=15)
    names = [("anatomy", "law", "virology")[i % 3] for i in range(300)]
    pairs = Pairs(np.array(challenger), np.array(champion), np.unique(names, return_inverse=True)[1])
    guard = compare_guard("mmlu", pairs, margin=0.05, alpha=0.05)
    within = statistics.stratified_t(np.array(challenger) - np.array(champion), names, alpha=0.05)
    assert guard.strata == 3 and (guard.stratified_low, guard.stratified_high) == (within.low, within.high)
    assert guard.method == "Tango score interval"


def test_a_seal_holds_for_anyone_and_breaks_at_any_change(tmp_path: Path) -> None:
    inputs = {"challenger": "a" * 64, "champion_eval_mmlu/samples.jsonl": "b" * 64}
    verdict = judge(flip(100, right=50, won=5, lost=6), inputs=inputs)
    write_verdict(verdict, tmp_path / "verdict.json")
    check_inputs(read_verdict((tmp_path / "verdict.json").read_text(), kept=verdict.seal), inputs)
    fields = json.loads((tmp_path / "verdict.json").read_text())
    seal = fields.pop("seal")  # as docs/gate.md tells anyone to, with nothing of varflow
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == seal
    for change in (
        {"decision": "PROMOTE"},
        {"reasons": []},
        {"inputs": inputs | {"challenger": "c" * 64}},
        {"guards": [fields["guards"][0] | {"margin": 0.5}]},
    ):
        with pytest.raises(ValueError, match="it was changed after the gate wrote it"):
            read_verdict(json.dumps(fields | {"seal": seal} | change))
    with pytest.raises(ValueError, match=r"1 of its inputs are not what it weighed: champion_eval_mmlu/samples\.jsonl"):
        check_inputs(verdict, inputs | {"champion_eval_mmlu/samples.jsonl": "d" * 64})
    forged = fields | {"decision": "PROMOTE"}
    with pytest.raises(
        ValueError, match="the file was replaced"
    ):  # a seal kept elsewhere, as the record does, still tells
        read_verdict(json.dumps(forged | {"seal": compute_seal(forged)}), kept=verdict.seal)
    other = fields | {"audits": []}
    with pytest.raises(
        OlderVerdictError, match=r"its seal holds, and its fields are those of another version .*audits"
    ):
        read_verdict(json.dumps(other | {"seal": compute_seal(other)}))
    del fields["audit"]  # as a gate wrote it that had no such field yet: still read, and the seal still holds
    assert read_verdict(json.dumps(fields | {"seal": compute_seal(fields)})).audit == ()
    with pytest.raises(ValueError, match="got one without seal"):
        read_verdict(json.dumps({"decision": "HOLD"}))


SUITE = SuiteConfig(
    benchmarks=(
        BenchmarkConfig(name="humaneval", tasks=("humaneval",), metric="pass@1"),
        BenchmarkConfig(name="mmlu_part", tasks=("mmlu",), metric="acc", limit=2),
        BenchmarkConfig(name="other", tasks=("arc_easy",), metric="acc"),
    )
)


def test_a_policy_is_flagged_when_it_is_loaded_if_equal_models_would_fail_it() -> None:
    assert [count_items(benchmark) for benchmark in SUITE.benchmarks] == [164, 114, None]
    margins = {"humaneval": 0.07, "mmlu_part": 0.1, "other": 0.0001}
    (flag,) = flag_policy(GatePolicy(margins=margins), SUITE)
    assert flag.startswith("humaneval: a margin of 7 points is below the 8.1 that 164 items hold")
    assert flag_policy(GatePolicy(margins={"humaneval": 0.082}), SUITE) == []
    assert flag_policy(GatePolicy(margins=margins, planned_discordance=0.07), SUITE) == []
    assert len(flag_policy(GatePolicy(margins=margins, planned_looks=52), SUITE)) == 2
    assert len(flag_policy(GatePolicy(margins={"humaneval": 0.082}, audit_share=0.1), SUITE)) == 1


def test_the_recipes_for_full_suites_have_margins_that_can_be_held() -> None:
    recipe = read_recipe("hh_rlhf")
    assert flag_policy(recipe.gate, recipe.suite) == []


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"margins": {"mmul": 0.01}}, "does not run: margins mmul; the suite runs humaneval, mmlu_part, other"),
        ({"margins": {}, "targets": {"gsm8k": 0}}, "targets gsm8k"),
        ({"margins": {}, "floors": {"heldout_reward": 0.5, "bbh": 0.5}}, "floors bbh"),
        ({"margins": {"humaneval": 0.0}}, "above 0 and below 1; got {'humaneval': 0.0}"),
        ({"margins": {"humaneval": -0.1}}, "above 0 and below 1"),
        ({"margins": {"humaneval": math.nan}}, "finite"),
        ({"margins": {}, "targets": {}}, "no target, so nothing could ever be promoted"),
        ({"margins": {}, "targets": {"humaneval": -0.1}}, "at least 0"),
        ({"margins": {}, "floors": {"humaneval": 20}}, "0.2 means 20 points"),
        ({"margins": {}, "planned_looks": 0}, "greater than or equal to 1"),
        ({"margins": {}, "audit_share": 0.9}, "less than or equal to 0.5"),
    ],
)
def test_policies_that_mean_nothing_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_names(GatePolicy(**policy), SUITE)


def test_lengths_are_asked_for_where_the_policy_bounds_them() -> None:
    ours, theirs = rewards(0.5)
    with pytest.raises(ValueError, match="no lengths of held-out answers were given"):
        decide(
            GatePolicy(margins={}),
            challenger=Evidence(rewards=ours),
            champion=Evidence(rewards=theirs),
            same_model=False,
        )
    free = decide(
        GatePolicy(margins={}, max_length_growth=None), challenger=Evidence(rewards=ours), champion=Evidence(rewards=theirs),
        same_model=False,
    )  # fmt: skip
    assert free.decision is Decision.promote and free.growths == ()
    with pytest.raises(ValueError, match="1 of 60 rows have a reward and no answer length"):
        some = {row: 1.0 for row in list(ours)[1:]}
        weigh(GatePolicy(margins={}), rewards_challenger=ours, rewards_champion=theirs, lengths=(some, some))


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
