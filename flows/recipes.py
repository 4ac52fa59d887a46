"""Named, complete configurations. Each is a function that returns one; derive by calling it and changing fields."""

from collections.abc import Callable

import evaluation.suites as suites
from evaluation.config import GatePolicy
from flows.config import AlignConfig, GivenReward, TrainedReward
from training.config import (
    Device,
    GenerateConfig,
    IngestConfig,
    ReferenceScoreConfig,
    ResponseRegime,
    RewardModelConfig,
    RewardScoreConfig,
    Runtime,
)
from training.objectives.var import ReferenceFactor, VarConfig


def demo() -> AlignConfig:
    """SmolLM2-135M on the small data that varflow ships, in minutes on two cores."""
    return AlignConfig(
        name="demo",
        model_name="demo-policy",
        policy="embedded:smollm2-135m-instruct",
        preferences="demo:preferences",
        ingest=IngestConfig(responses=ResponseRegime.support, heldout_fraction=0.2, max_invalid_fraction=0.08),
        reward=TrainedReward(
            training=RewardModelConfig(learning_rate=1e-4, epochs=4, batch_prompts=8, max_tokens=128),
            scoring=RewardScoreConfig(max_tokens=128),
        ),
        reference=ReferenceScoreConfig(max_tokens=192),
        train=VarConfig(
            # mean: over responses this short the sum differs by tens of nats within a pair and drowns the reward
            reference_factor=ReferenceFactor.mean,
            lambda_=0.5,
            learning_rate=3e-5,
            batch_prompts=8,
            max_tokens=192,
        ),
        heldout=GenerateConfig(max_new_tokens=48, temperature=0.0, max_prompt_tokens=192),
        benchmarks="demo:benchmarks",
        suite=suites.demo(),
        # wide, as so few items can hold no less: equal models pass all four in most runs (docs/gate.md)
        gate=GatePolicy(margins={"mmlu_part": 0.25, "gsm8k_part": 0.45, "humaneval_part": 0.45, "bbh_part": 0.55}),
        champion="base",  # pinned, so that a second run measures against the same model and finds every step done
        runtime=Runtime(device=Device.cpu),
    )


def smoke() -> AlignConfig:
    """Two-layer random models: every stage for real, in seconds. Its numbers mean nothing."""
    return AlignConfig(
        name="smoke",
        model_name="smoke-policy",
        policy="demo:tiny-policy",
        preferences="demo:preferences",
        ingest=IngestConfig(
            responses=ResponseRegime.support, limit=48, heldout_fraction=0.25, max_invalid_fraction=0.5
        ),
        reward=GivenReward(model="demo:tiny-reward-model", scoring=RewardScoreConfig(max_tokens=64)),
        reference=ReferenceScoreConfig(max_tokens=512),
        # mean: as `demo`, whose rows these are
        train=VarConfig(reference_factor=ReferenceFactor.mean, batch_prompts=8, max_tokens=512),
        heldout=GenerateConfig(max_new_tokens=8, limit=8),
        benchmarks="demo:benchmarks",
        suite=suites.smoke(),
        gate=GatePolicy(margins={benchmark.name: 0.35 for benchmark in suites.smoke().benchmarks}),
        champion="base",
        runtime=Runtime(device=Device.cpu, threads=1, checkpoint_every_steps=1),
    )


def hh_rlhf() -> AlignConfig:
    """SmolLM2-135M on the helpful half of Anthropic's HH-RLHF; give it `benchmarks`, and `preferences` as a local folder where there is no hub."""
    return AlignConfig(
        name="hh_rlhf",
        model_name="hh-policy",
        policy="embedded:smollm2-135m-instruct",
        # Not all of it: its test files are what a policy is tested on, and red-team-attempts is no preferences.
        preferences="hub:datasets/Anthropic/hh-rlhf@09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/helpful-base/train.jsonl.gz",
        ingest=IngestConfig(responses=ResponseRegime.support, heldout_fraction=0.15),
        reward=TrainedReward(),
        train=VarConfig(
            # mean: HH-RLHF pairs differ by some 43 nats of length alone, and the sum would be nearly blind to the reward
            reference_factor=ReferenceFactor.mean,
            lambda_=0.5,
            learning_rate=2e-5,
        ),
        heldout=GenerateConfig(max_new_tokens=96, temperature=0.0),
        benchmarks="benchmarks",
        suite=suites.paper(),
        gate=GatePolicy(margins={"mmlu": 0.01, "gsm8k": 0.03, "humaneval": 0.09, "bbh": 0.02}),
    )


RECIPES: dict[str, Callable[[], AlignConfig]] = {recipe.__name__: recipe for recipe in (demo, smoke, hh_rlhf)}


def read_recipe(name: str) -> AlignConfig:
    """Return a recipe's configuration. Raises ValueError naming those there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: no such recipe; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()
