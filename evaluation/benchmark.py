"""The job `benchmark`: one policy, one benchmark, its scores, samples and profile."""

import json
import math
from pathlib import Path
from typing import Any

from evaluation.config import BenchmarkConfig
from evaluation.mirror import missing_data
from training.config import Runtime
from training.job import Job, write_json

FLAG_SAMPLES = 5
FLAG_CHARS = 200
CHANCE_STDERRS = 2.0

Row = dict[str, Any]


def run(job: Job) -> None:
    """Evaluate `inputs.model` on the data in `inputs.mirror` and write the files that docs/architecture.md lists.

    A run that was stopped or killed goes on from the answers it has kept in `work`; its partial files are overwritten.
    """
    config = BenchmarkConfig.model_validate(job.config)
    runtime = Runtime.model_validate(job.runtime)
    mirror = job.inputs["mirror"]
    missing = missing_data(mirror, [config])
    if missing:
        raise ValueError(
            f"benchmark {config.name}: the mirror {mirror} lacks {len(missing)} files: {', '.join(missing)}; "
            "add their raw files and build the mirror again, or take the tasks out of the suite"
        )
    import torch  # seconds, and only now that there is something to do

    from evaluation.harness import evaluate

    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    rows = evaluate(
        job.inputs["model"].resolve(),
        mirror,
        config,
        runtime=runtime,
        output=job.output,
        work=job.work,
        stop=job.stop,
    )
    write_json(job.output / "scores.json", rows)
    job.write_summary(summarise(rows, output=job.output, name=config.name))


def summarise(rows: list[Row], *, output: Path, name: str) -> Row:
    """Return the deciding score, what share of the answers was unusable, and a flag where the score itself is suspect."""
    (deciding,) = (row for row in rows if row["decides"])
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    flag = find_flag(deciding, samples)
    summary: Row = {
        "benchmark": name,
        "value": deciding["value"],
        "stderr": deciding["stderr"],
        "items": deciding["n"],
        "macro_value": macro_mean(samples),
        "empty_answer_share": sum(not s["answer"].strip() for s in samples) / len(samples),
        "unextracted_share": sum(not s["extracted"] for s in samples) / len(samples),
        "truncated_prompts": json.loads((output / "profile.json").read_text())["truncated_prompts"],
        "flag": flag,
    }
    for index, sample in enumerate(samples[:FLAG_SAMPLES] if flag else []):
        shown = f"{sample['prompt'][-FLAG_CHARS:]!r} -> {sample['answer'][:FLAG_CHARS]!r}, not {sample['target'][:FLAG_CHARS]!r}"
        summary[f"flag_sample_{index + 1}"] = shown
    return summary


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
