"""Evaluations by reward model: the sets they read, and the figures of policies and of reward models on them."""

import re
from typing import TYPE_CHECKING

from evaluation.config import PairSetConfig, PromptSetConfig
from tasks.step import Attempt, Metrics, step
from training.job import write_json

if TYPE_CHECKING:
    from evaluation.alignment import AlignmentResult
    from evaluation.reward_bias import RewardBias


@step(version=1)
def prompt_set(config: PromptSetConfig, attempt: Attempt) -> Metrics:
    """Lay the prompts of a set out as rows without responses. Input: `raw`, its folder."""
    from evaluation.eval_sets import write_prompts

    counts = write_prompts(attempt.inputs["raw"], config, output=attempt.output)
    write_json(attempt.output / "summary.json", counts)
    return {f"data/{config.title}": float(counts["rows"])}


@step(version=1)
def pair_set(config: PairSetConfig, attempt: Attempt) -> Metrics:
    """Lay the pairs of a set out as rows, the better answer first. Input: `raw`, its folder."""
    from evaluation.eval_sets import write_pairs

    counts = write_pairs(attempt.inputs["raw"], config, output=attempt.output)
    write_json(attempt.output / "summary.json", counts)
    return {f"data/{config.title}": float(counts["rows"])}


@step(version=2)
def alignment(config: PromptSetConfig, attempt: Attempt) -> Metrics:
    """Weigh the rewards of a model's answers to a prompt set. Inputs: `answers`, `rewards`, and perhaps a baseline's as
    `baseline_answers`, `baseline_rewards`."""
    from evaluation.alignment import measure, read_answers

    inputs = attempt.inputs
    model = read_answers(inputs["answers"], inputs["rewards"])
    has_baseline = "baseline_answers" in inputs
    baseline = read_answers(inputs["baseline_answers"], inputs["baseline_rewards"]) if has_baseline else None
    result = measure(config.title, model, baseline)
    write_json(attempt.output / "alignment.json", result.model_dump(mode="json"))
    metrics = describe_alignment(result)
    write_json(attempt.output / "summary.json", {"benchmark": config.title, "flag": result.flag} | metrics)
    return metrics


@step(version=2)
def reward_bias(config: PairSetConfig, attempt: Attempt) -> Metrics:
    """Test a reward model on a pair set. Inputs: `rows`, `scores`."""
    from evaluation.reward_bias import measure

    result = measure(config.title, rows=attempt.inputs["rows"], scores=attempt.inputs["scores"])
    write_json(attempt.output / "reward_bias.json", result.model_dump(mode="json"))
    metrics = describe_bias(result)
    write_json(attempt.output / "summary.json", {"benchmark": config.title, "flag": result.flag} | metrics)
    return metrics


def describe_alignment(result: "AlignmentResult") -> Metrics:
    """Return the figures by the names that they have in MLflow."""
    figures: dict[str, float | None] = {
        "reward": result.model.reward,
        "reward_stderr": result.model.stderr,
        "n": float(result.n),
        "characters": result.model.characters,
    }
    if result.baseline and result.gain and result.win_rate:
        figures |= {
            "reward_baseline": result.baseline.reward,
            "reward_baseline_stderr": result.baseline.stderr,
            "characters_baseline": result.baseline.characters,
            "reward_gain": result.gain.difference,
            "reward_gain_low": result.gain.low,
            "reward_gain_high": result.gain.high,
            "win_rate": result.win_rate.value,
            "win_rate_low": result.win_rate.low,
            "win_rate_high": result.win_rate.high,
        }
    return {f"eval/{result.name}/{name}": value for name, value in figures.items() if value is not None}


def describe_bias(result: "RewardBias") -> Metrics:
    """Return the figures by the names that they have in MLflow; of a group `eval/evalbiasbench/length_bias/accuracy`."""
    overall = result.overall
    figures: dict[str, float | None] = {
        "accuracy": overall.accuracy,
        "accuracy_low": overall.low,
        "accuracy_high": overall.high,
        "n": float(overall.n),
        "macro_accuracy": result.macro_accuracy,
        "length_baseline": overall.length_baseline,
        "longer_preferred": result.longer_preferred,
        "length_spearman": result.length_spearman,
    }
    figures |= {f"{re.sub('[^a-z]+', '_', each.group.lower())}/accuracy": each.accuracy for each in result.groups}
    return {f"eval/{result.name}/{name}": value for name, value in figures.items() if value is not None}
