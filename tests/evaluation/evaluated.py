"""Two small benchmarks, and what an evaluation of one leaves."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.config import BenchmarkConfig
from evaluation.harness.run import evaluate
from training.config import Device, Runtime
from training.job import write_json

MMLU = BenchmarkConfig(
    name="mmlu_part", tasks=("mmlu_anatomy", "mmlu_virology"), num_fewshot=0, metric="acc", max_length=1024
)
GSM8K = BenchmarkConfig(
    name="gsm8k_part",
    tasks=("gsm8k",),
    num_fewshot=2,
    metric="exact_match",
    filter="strict-match",
    max_gen_toks=12,
    max_length=1024,
)


@dataclass
class Evaluated:
    """The rows, files and kept answers of one evaluation; two are equal wherever time does not matter."""

    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    profile: dict[str, Any]
    answers: dict[str, Any]  # by request
    progress: list[dict[str, Any]] = field(compare=False)

    def row(self, task: str, filter_name: str = "none") -> dict[str, Any]:
        (row,) = (r for r in self.rows if (r["task"], r["filter"]) == (task, filter_name))
        return row


def run(model: Path, mirror: Path, config: BenchmarkConfig, *, folder: Path, **options: Any) -> Evaluated:
    """Evaluate into `folder`, on one CPU process unless `runtime` says otherwise."""
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    options = {"runtime": Runtime(device=Device.cpu), "stop": threading.Event()} | options
    rows = evaluate(model, mirror, config, output=output, work=folder / "work", **options)
    write_json(output / "scores.json", rows)
    return Evaluated(
        rows=rows,
        samples=read_lines(output / "samples.jsonl"),
        profile=json.loads((output / "profile.json").read_text()),
        answers=dict(read_answers(folder)),
        progress=read_lines(output / "metrics.jsonl"),
    )


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_answers(folder: Path) -> list[Any]:
    """Return the answers that an evaluation keeps, behind the line that names what gave them; none before the first."""
    path = folder / "work" / "responses.jsonl"
    return read_lines(path)[1:] if path.is_file() else []
