"""How often the gate is wrong: the real `decide` on simulated models whose true differences are known.

`python -m benchmarks.gate_simulation --json [--runs 2000]`. Each run draws the scores of two models on the items of all four benchmarks in
full (MMLU in 57 tasks, BBH in 27) and their rewards on held-out prompts, and asks the gate by the policy of the recipe `hh_rlhf`.

Keys, each with `rate`, `runs`, and the 95 % Clopper-Pearson interval `low`, `high` of that rate:
`false_promotion_rate`: equal models, Δ = 0 for every guard and the target, promoted all the same.
`false_promotion_at_margin`: one guard loses exactly its margin while the target gains a whole standard deviation; `by_guard` has each guard,
the figure itself is the worst of them.
`power_at_mde`: promotions when the target gains what the verdict prints as the gain that would be promoted 4 times in 5, and no guard
moves (`guard_differences`).
`false_promotion_clustered`: equal models, each held-out prompt there in six rows with one answer, as greedy answers to pairs data are.
`false_promotion_any_of_two`: equal models, the held-out reward or MMLU is to be better, by Holm.
`false_promotion_in_a_year`: equal models, asked 52 times as planned; years in which at least one look promotes, of a quarter as many runs. No
benchmark is guarded, which could only hold.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import numpy as np
from scipy import stats

from evaluation.config import HELDOUT_REWARD, GatePolicy, Look
from evaluation.gate import weigh
from evaluation.gate.decide import Evidence, decide
from evaluation.gate.policy import TASK_SIZES
from evaluation.gate.verdict import Decision
from evaluation.harness.result import BenchmarkResult, ItemKey
from evaluation.statistics import passing_power
from flows.recipes import read_recipe

BENCHMARKS = {"mmlu": "mmlu", "gsm8k": "gsm8k", "humaneval": "humaneval", "bbh": "bbh_cot_fewshot"}
DISCORDANCE = 0.1
PROMPTS, REWARD_SD = 200, 1.0
ROWS_OF_A_PROMPT = 6
LOOKS_OF_A_YEAR = 52
CHARACTERS, CHARACTERS_SD = 300.0, 60.0
FAR_ABOVE = 1.0  # in standard deviations of the gain: shown in every run
SEED = 20_261_125


@dataclass(frozen=True)
class World:
    """The champion, and what every challenger is drawn from."""

    policy: GatePolicy
    keys: Mapping[str, tuple[ItemKey, ...]]
    champion: Evidence
    prompts: Mapping[str, str]  # of each row

    def draw(self, rng: np.random.Generator, *, losses: Mapping[str, float], gain: float) -> Evidence:
        """Return a challenger whose true score is lower by `losses` and whose true reward is higher by `gain`."""
        results = [
            BenchmarkResult(result.benchmark, (), self._answer(rng, result, losses.get(result.benchmark, 0.0)), {})
            for result in self.champion.results
        ]
        names = dict.fromkeys(self.prompts.values())
        rewards, lengths = (
            dict(zip(names, rng.normal(mean, sd, PROMPTS).tolist(), strict=True))
            for mean, sd in ((gain, REWARD_SD), (CHARACTERS, CHARACTERS_SD))
        )
        rows = self.prompts.items()
        return Evidence(results, {row: rewards[name] for row, name in rows}, {row: lengths[name] for row, name in rows})

    def decide(self, challenger: Evidence, *, looks: Sequence[Look] = ()) -> Decision:
        """Return what the gate says."""
        return decide(
            self.policy,
            challenger=challenger,
            champion=self.champion,
            same_model=False,
            prompts=self.prompts,
            looks=looks,
        ).decision

    def _answer(self, rng: np.random.Generator, result: BenchmarkResult, loss: float) -> dict[ItemKey, float]:
        """Return the challenger's items: half of the champion's are right, so that a flip goes either way by that half's rate."""
        items, keys = dict(result.items), self.keys[result.benchmark]
        right_N = np.fromiter(result.items.values(), dtype=np.float64, count=len(keys))
        rate_N = np.where(
            right_N == 1, (DISCORDANCE + loss) / 2 / right_N.mean(), (DISCORDANCE - loss) / 2 / (1 - right_N.mean())
        )
        for index in np.flatnonzero(rng.random(len(keys)) < rate_N):
            items[keys[index]] = 1.0 - items[keys[index]]
        return items


def make_world(*, benchmarks: Mapping[str, str] = BENCHMARKS, rows_of_a_prompt: int = 1, **policy: Any) -> World:
    """Return a champion that has half of each benchmark right; `policy` is what differs from the recipe's."""
    keys, results = {}, []
    for name, task in benchmarks.items():
        tasks, items = TASK_SIZES[task]
        keys[name] = tuple(sorted((f"{task}_{i % tasks:02d}", f"{i:05d}") for i in range(items)))
        right = {key: float(i % 2) for i, key in enumerate(keys[name])}
        results.append(BenchmarkResult(name, (), right, {}))
    prompts = {f"{i:032x}/{k}": f"{i:032x}" for i in range(PROMPTS) for k in range(rows_of_a_prompt)}
    champion = Evidence(results, dict.fromkeys(prompts, 0.0), dict.fromkeys(prompts, CHARACTERS))
    return World(read_recipe("hh_rlhf").gate.model_copy(update=policy), keys, champion, prompts)


def draw_promotions(world: World, *, losses: Mapping[str, float], gain: float, stream: Sequence[int]) -> Iterator[bool]:
    """Yield whether the gate promotes, challenger by challenger."""
    rng = np.random.default_rng([SEED, *stream])
    while True:
        yield world.decide(world.draw(rng, losses=losses, gain=gain)) is Decision.promote


def draw_years(world: World, *, stream: Sequence[int]) -> Iterator[bool]:
    """Yield whether the gate promotes at least one of a year's equal models, year by year."""
    rng = np.random.default_rng([SEED, *stream])
    look = Look(alpha=world.policy.alpha_of_a_look, planned=True)
    while True:
        said = [
            world.decide(world.draw(rng, losses={}, gain=0.0), looks=[look] * before)
            for before in range(LOOKS_OF_A_YEAR)
        ]
        yield Decision.promote in said


def count(promotions: Iterator[bool], *, runs: int) -> dict[str, Any]:
    """Return how often a promotion was drawn, with the interval of that rate."""
    promoted = sum(islice(promotions, runs))
    interval = stats.binomtest(promoted, runs).proportion_ci(confidence_level=0.95, method="exact")
    return {
        "rate": promoted / runs,
        "runs": runs,
        "low": round(float(interval.low), 5),
        "high": round(float(interval.high), 5),
    }


def count_promotions(
    world: World, *, runs: int, losses: Mapping[str, float], gain: float, stream: Sequence[int]
) -> dict[str, Any]:
    """Return how often the gate promotes, with the interval of that rate."""
    return count(draw_promotions(world, losses=losses, gain=gain, stream=stream), runs=runs)


def make_clustered() -> World:
    """Return a world in which several rows have one prompt, and one answer."""
    return make_world(benchmarks={}, rows_of_a_prompt=ROWS_OF_A_PROMPT, margins={})


def make_either() -> World:
    """Return a world in which one of two targets is enough."""
    return make_world(targets={HELDOUT_REWARD: 0.0, "mmlu": 0.0})


def make_year() -> World:
    """Return a world whose gate is asked as often as it was planned."""
    return make_world(benchmarks={}, margins={}, planned_looks=LOOKS_OF_A_YEAR)


def find_gain(world: World) -> float:
    """Return the gain that a verdict on these sizes prints, for the true discordance and spread."""
    alpha = world.policy.alpha_of_a_look
    passing = prod(
        passing_power(len(world.keys[name]), discordance=DISCORDANCE, margin=margin, alpha=alpha)
        for name, margin in world.policy.margins.items()
    )
    gain = weigh.find_promotable_gain(PROMPTS, sd=REWARD_SD, discordance=None, passing=passing, alpha=alpha)
    assert gain is not None, "the recipe's margins let equal models pass often enough"
    return gain


def simulate(runs: int) -> dict[str, Any]:
    """Return the figures."""
    world = make_world()
    margins = world.policy.margins
    by_guard = {
        name: count_promotions(world, runs=runs, losses={name: margin}, gain=FAR_ABOVE, stream=(1, number))
        for number, (name, margin) in enumerate(margins.items())
    }
    worst = max(by_guard.values(), key=lambda figure: figure["rate"])
    gain = find_gain(world)
    power = count_promotions(world, runs=runs, losses={}, gain=gain, stream=(2,))
    return {
        "false_promotion_rate": count_promotions(world, runs=runs, losses={}, gain=0.0, stream=(0,)),
        "false_promotion_at_margin": worst | {"by_guard": by_guard},
        "power_at_mde": power | {"gain": gain, "guard_differences": dict.fromkeys(margins, 0.0)},
        "false_promotion_clustered": count_promotions(make_clustered(), runs=runs, losses={}, gain=0.0, stream=(3,)),
        "false_promotion_any_of_two": count_promotions(make_either(), runs=runs, losses={}, gain=0.0, stream=(4,)),
        "false_promotion_in_a_year": count(draw_years(make_year(), stream=(5,)), runs=max(1, runs // 4)),
    }


def main() -> None:
    """Simulate and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulations of each case")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    started = time.monotonic()
    figures = simulate(options.runs)
    if not options.json:
        for name, figure in figures.items():
            print(f"{name:28}{figure['rate']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}] of {figure['runs']}")
    setup = {
        "policy": read_recipe("hh_rlhf").gate.model_dump(mode="json"),
        "items": {name: TASK_SIZES[task][1] for name, task in BENCHMARKS.items()},
        "prompts": PROMPTS,
        "discordance": DISCORDANCE,
        "seconds": round(time.monotonic() - started, 1),
        "python": platform.python_version(),
    }
    print(json.dumps(figures | setup))


if __name__ == "__main__":
    main()
