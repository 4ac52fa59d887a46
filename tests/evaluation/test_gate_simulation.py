"""The gate's error rates, by the benchmark that measures them."""

import pytest

from benchmarks.gate_simulation import (
    BENCHMARKS,
    FAR_ABOVE,
    PROMPTS,
    World,
    count,
    count_promotions,
    draw_years,
    find_gain,
    make_clustered,
    make_either,
    make_world,
    make_year,
)


def test_a_simulated_world_is_the_four_benchmarks_and_repeats() -> None:
    world = make_world()
    assert {name: len(keys) for name, keys in world.keys.items()} == {
        "mmlu": 14_042, "gsm8k": 1_319, "humaneval": 164, "bbh": 6_511,
    }  # fmt: skip
    assert set(world.policy.margins) == set(BENCHMARKS)
    far = {name: 10 * margin for name, margin in world.policy.margins.items() if name == "mmlu"}
    first, second = (count_promotions(world, runs=4, losses=far, gain=FAR_ABOVE, stream=(9,)) for _ in range(2))
    assert first == second and first["rate"] == 0
    better = {name: -0.02 for name in BENCHMARKS}
    assert count_promotions(world, runs=4, losses=better, gain=FAR_ABOVE, stream=(9,))["rate"] == 1


@pytest.mark.slow
def test_equal_models_are_promoted_no_more_often_than_alpha() -> None:
    assert count_promotions(make_world(), runs=2000, losses={}, gain=0.0, stream=(0,))["rate"] <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("guard", BENCHMARKS)
def test_a_guard_at_its_margin_is_promoted_no_more_often_than_alpha(guard: str) -> None:
    world = make_world()
    losses = {guard: world.policy.margins[guard]}
    assert count_promotions(world, runs=2000, losses=losses, gain=FAR_ABOVE, stream=(1,))["rate"] <= 0.06


@pytest.mark.slow
def test_power_at_the_printed_gain() -> None:
    world = make_world()
    assert count_promotions(world, runs=2000, losses={}, gain=find_gain(world), stream=(2,))["rate"] >= 0.8


@pytest.mark.parametrize(("world", "gain"), [(make_clustered(), FAR_ABOVE), (make_year(), FAR_ABOVE)])
def test_worlds_without_benchmarks_promote_what_is_better(world: World, gain: float) -> None:
    assert len(set(world.prompts.values())) == PROMPTS
    assert count_promotions(world, runs=4, losses={}, gain=gain, stream=(9,))["rate"] == 1


def test_rows_of_one_prompt_do_not_make_equal_models_look_better() -> None:
    """Counted once a row, a quarter of them would be promoted: 1.645 / sqrt(6) standard errors are enough."""
    assert count_promotions(make_clustered(), runs=200, losses={}, gain=0.0, stream=(3,))["rate"] <= 0.11


@pytest.mark.slow
def test_rows_of_one_prompt_count_once() -> None:
    assert count_promotions(make_clustered(), runs=2000, losses={}, gain=0.0, stream=(3,))["rate"] <= 0.06


@pytest.mark.slow
def test_either_of_two_targets_is_promoted_no_more_often_than_alpha() -> None:
    assert count_promotions(make_either(), runs=2000, losses={}, gain=0.0, stream=(4,))["rate"] <= 0.06


@pytest.mark.slow
def test_a_year_of_planned_looks_promotes_falsely_no_more_often_than_its_alpha() -> None:
    figure = count(draw_years(make_year(), stream=(5,)), runs=500)
    assert figure["low"] <= 0.05 and figure["rate"] <= 0.07  # 500 years: a rate of 0.05 exceeds 0.07 in 3 % of them
