"""The noise floor: how far a model's scores move when nothing about the model does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.config import BenchmarkConfig, NoiseConfig, SuiteConfig
from evaluation.gate.verdict import Noise
from tasks.evaluate import evaluate_varied
from tasks.step import Attempt, Given, Metrics, Planned, step
from training.config import Runtime
from training.job import write_json

if TYPE_CHECKING:
    from evaluation.harness.result import BenchmarkResult

VARIED = {"seed": "few-shot seed", "batch": "batch size"}
FILE = "noise.json"


@step(version=1)
def noise(config: NoiseConfig, attempt: Attempt) -> Metrics:
    """Compare runs of one model that vary one thing. Inputs: `eval_<benchmark>`, and the same varied as
    `<kind>_<value>_eval_<benchmark>`, of the kinds seed and batch."""
    from evaluation.gate.decide import measure_noise  # SciPy
    from evaluation.harness.result import read_result

    runs: dict[tuple[str, str], list[BenchmarkResult]] = {}
    for name, folder in sorted(attempt.inputs.items()):
        how, _, benchmark = name.partition("eval_")
        if kind := how.partition("_")[0]:
            runs.setdefault((benchmark, kind), [read_result(attempt.inputs[f"eval_{benchmark}"])])
            runs[benchmark, kind].append(read_result(folder))
    found = {key: measure_noise(results, varied=VARIED[key[1]]) for key, results in runs.items()}
    told: dict[str, list[object]] = {}
    for (benchmark, _), floor in found.items():
        told.setdefault(benchmark, []).append(floor.model_dump(mode="json"))
    write_json(attempt.output / FILE, told)
    flips = {f"noise/{benchmark}/{kind}_flip_rate": floor.flip_rate for (benchmark, kind), floor in found.items()}
    moves = {f"noise/{benchmark}/{kind}_max_difference": f.max_difference for (benchmark, kind), f in found.items()}
    return flips | moves


def read_noise(folder: Path) -> dict[str, tuple[Noise, ...]]:
    """Return the noise floors of each benchmark."""
    told = json.loads((folder / FILE).read_text())
    return {name: tuple(Noise.model_validate(floor) for floor in floors) for name, floors in told.items()}


def plan_noise(
    config: NoiseConfig,
    suite: SuiteConfig,
    *,
    model: Given,
    files: Given,
    measured: Mapping[str, Given],
    runtime: Runtime,
) -> tuple[list[Planned], Planned] | None:
    """Return the varied evaluations of a model and the step that compares them with those `measured` of it, by benchmark; None where
    nothing is varied."""
    inputs: dict[str, Given] = {"model": model, "mirror": files}
    varied = {
        f"{kind}_{value}_eval_{benchmark.name}": evaluate_varied(
            benchmark, inputs, runtime=runtime, label=f"{benchmark.name} {kind} {value}"
        )
        for kind, value, benchmark in vary(suite, config)
    }
    if not varied:
        return None
    of = {name.partition("_eval_")[2] for name in varied}
    as_it_is: dict[str, Given] = {f"eval_{name}": step for name, step in measured.items() if name in of}
    return [*varied.values()], noise(config, as_it_is | varied, runtime=runtime)


def vary(suite: SuiteConfig, config: NoiseConfig) -> Iterator[tuple[str, int, BenchmarkConfig]]:
    """Yield (kind, value, benchmark) of each benchmark under each other few-shot seed, where it draws examples, and batch size."""
    for benchmark in suite.benchmarks:
        changes = [("seed", "seed", benchmark.seed + n + 1) for n in range(config.seeds) if benchmark.num_fewshot]
        changes += [("batch", "batch_size", size) for size in config.batch_sizes]
        for kind, field, value in changes:
            yield kind, value, BenchmarkConfig.model_validate(benchmark.model_dump() | {field: value})
