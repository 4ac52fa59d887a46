"""The job `benchmark`: one policy, one benchmark, its scores, samples and profile."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evaluation.config import VariedConfig
from evaluation.harness.mirror import FILL, missing_data
from training.config import Runtime
from training.job import Job, read_json_lines, write_json

FLAG_SAMPLES = 5
FLAG_CHARS = 200
CHANCE_STDERRS = 2.0
MOST_UNUSABLE = 0.2  # share of answers that nothing could be found in, or that the limit ended
MOST_TIMEOUTS = 0.05  # share of programs that were ended by the clock, which runs faster than they on a busy machine
FILTER_GAP = 0.05  # between two filters of one metric: what decides may measure the format

Row = dict[str, Any]


def run(job: Job) -> None:
    """Evaluate `inputs.model` on the data in `inputs.mirror` and write the files that docs/architecture.md lists.

    A run that was stopped or killed goes on from the answers it has kept in `work`; its partial files are overwritten. The key of an
    endpoint, if it has one, is the first line of the standard input.
    """
    varied = VariedConfig.model_validate(job.config)
    config, runtime = varied.benchmark, Runtime.model_validate(job.runtime)
    if varied.workers:
        runtime = runtime.model_copy(update={"workers": varied.workers})
    mirror = job.inputs["mirror"]
    missing = missing_data(mirror, [config])
    if missing:
        raise ValueError(
            f"benchmark {config.name}: the mirror {mirror} lacks {len(missing)} files or tasks: {', '.join(missing)}; "
            f"{FILL}, or take the tasks out of the suite"
        )
    import torch  # seconds, and only now that there is something to do

    from evaluation.harness.run import evaluate

    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    key = sys.stdin.readline().strip() if config.endpoint else ""  # an environment is read by more than its process
    rows = evaluate(
        job.inputs["model"].resolve(),
        mirror,
        config,
        runtime=runtime,
        output=job.output,
        work=job.work,
        stop=job.stop,
        key=key,
    )
    summary = summarise(rows, output=job.output, name=config.name)
    write_json(
        job.output / "scores.json", [row | ({"flag": summary["flag"]} if row["decides"] else {}) for row in rows]
    )
    job.write_summary(summary)


def summarise(rows: list[Row], *, output: Path, name: str) -> Row:
    """Return the deciding score, what share of the answers was unusable, and a flag where the score itself is suspect."""
    (deciding,) = (row for row in rows if row["decides"])
    samples = read_json_lines(output / "samples.jsonl")
    profile = json.loads((output / "profile.json").read_text())
    summary: Row = {
        "benchmark": name,
        "value": deciding["value"],
        "stderr": deciding["stderr"],
        "items": deciding["n"],
        "macro_value": macro_mean(samples),
        "empty_answer_share": share(not s["answer"].strip() for s in samples),
        "unextracted_share": share(not s["extracted"] for s in samples),
        "unextracted_by_all_share": share(not s["extracted_by_any"] for s in samples),
        "cut_share": share(s["cut"] for s in samples),
        "tied_share": share(s["tied"] for s in samples),
        "truncated_prompts": profile["truncated_prompts"],
        "bos_count": profile["bos"]["count"],
    }
    if "ending" in samples[0]:
        summary["timeout_share"] = share(s["ending"] == "timeout" for s in samples)
    other_filters = {row["filter"]: row["value"] for row in find_twins(deciding, rows)}
    suspect = find_flag(deciding, samples)
    flags = [suspect, *find_format_flags(summary, other_filters, deciding=deciding)]
    summary |= {f"value_{filter_name.replace('-', '_')}": value for filter_name, value in other_filters.items()}
    summary["flag"] = "; ".join(flag for flag in flags if flag) or None
    for index, sample in enumerate(samples[:FLAG_SAMPLES] if summary["flag"] else []):
        shown = f"{sample['prompt'][-FLAG_CHARS:]!r} -> {sample['answer'][:FLAG_CHARS]!r}, not {sample['target'][:FLAG_CHARS]!r}"
        summary[f"flag_sample_{index + 1}"] = shown
    return summary


def share(values: Iterable[bool]) -> float:
    """Return the share of true values."""
    counted = list(values)
    return sum(counted) / len(counted)


def find_twins(deciding: Row, rows: list[Row]) -> list[Row]:
    """Return the rows of the deciding task and metric under other filters."""
    same = [row for row in rows if (row["task"], row["metric"]) == (deciding["task"], deciding["metric"])]
    return [row for row in same if row["filter"] != deciding["filter"]]


def find_format_flags(summary: Row, other_filters: dict[str, float], *, deciding: Row) -> Iterator[str]:
    """Yield what says that a score is about the form of the answers, or about the limit, and not about their content."""
    if summary["empty_answer_share"] > MOST_UNUSABLE:
        yield f"empty: {summary['empty_answer_share']:.0%} of the answers have no text"
    if summary["unextracted_share"] > MOST_UNUSABLE:
        yield f"format: in {summary['unextracted_share']:.0%} of the answers {deciding['filter']} found nothing, in {summary['unextracted_by_all_share']:.0%} no filter did"
    if summary["cut_share"] > MOST_UNUSABLE:
        yield f"limit: {summary['cut_share']:.0%} of the answers were ended by the token limit (max_gen_toks)"
    if summary["tied_share"] > MOST_UNUSABLE:
        yield f"ties: in {summary['tied_share']:.0%} of the items the model tells no choice from another, and the first counts"
    if summary.get("timeout_share", 0.0) > MOST_TIMEOUTS:
        yield f"time: {summary['timeout_share']:.0%} of the programs were still running at their limit (sandbox_seconds); a busy machine does that too"
    if summary["truncated_prompts"]:
        yield f"prompts: {summary['truncated_prompts']} did not fit and were cut from the left (max_length)"
    for name, value in other_filters.items():
        if abs(value - deciding["value"]) > FILTER_GAP:
            yield f"filters: {deciding['filter']} says {deciding['value']:.4f}, {name} says {value:.4f} of the same answers"


def macro_mean(samples: list[Row]) -> float:
    """Return the unweighted mean of the tasks' means."""
    by_task: dict[str, list[float]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(sample["correct"])
    return math.fsum(math.fsum(values) / len(values) for values in by_task.values()) / len(by_task)


def find_flag(deciding: Row, samples: list[Row]) -> str | None:
    """Return why the score may say nothing about the model, or None: nothing right, or no better than guessing."""
    if deciding["value"] == 0:
        return f"zero: none of {len(samples)} answers is right"
    choices = [sample["choices"] for sample in samples]
    if None in choices:
        return None
    chance = math.fsum(1 / count for count in choices) / len(choices)
    spread = CHANCE_STDERRS * (deciding["stderr"] or 0.0)
    if deciding["value"] <= chance + spread:
        return f"chance: {deciding['value']:.4f} is not above guessing, {chance:.4f}, by {CHANCE_STDERRS:g} standard errors"
    return None
