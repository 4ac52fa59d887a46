"""The noise floor: how far a model's scores move when nothing about the model does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.config import Backend, NoiseConfig, SuiteConfig, VariedConfig
from evaluation.gate.verdict import Noise
from tasks.evaluate import evaluate_varied
from tasks.step import Attempt, Given, Metrics, Planned, step
from training.config import Device, Runtime
from training.job import write_json

if TYPE_CHECKING:
    from evaluation.harness.result import BenchmarkResult

VARIED = {"seed": "few-shot seed", "batch": "batch size", "workers": "number of workers"}
FILE = "noise.json"


@step(version=1)
def noise(config: NoiseConfig, attempt: Attempt) -> Metrics:
    """Compare runs of one model that vary one thing. Inputs: `eval_<benchmark>`, and the same varied as
    `<kind>_<value>_eval_<benchmark>`, of the kinds seed, batch and workers."""
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
    nothing is varied. ValueError for a number of workers that the run as it is has, too."""
    if runtime.workers in config.workers:
        raise ValueError(
            f"noise.workers: got {runtime.workers}, which is runtime.workers, so nothing would vary; expected other numbers; take it out"
        )
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


def choose_noise(suite: SuiteConfig, runtime: Runtime) -> NoiseConfig:
    """Return what `varflow benchmark --noise` varies: two more few-shot seeds, every prompt alone, and two worker processes, or one where
    the runtime has more. No workers with vLLM, which spreads one model over them, nor on a single GPU, which two would not fit on."""
    import torch  # seconds, of a command that takes minutes

    backends = {benchmark.backend for benchmark in suite.benchmarks}
    alone = Backend.transformers in backends and runtime.device != Device.cpu and torch.cuda.device_count() == 1
    workers = () if alone or Backend.vllm in backends else (2 if runtime.workers == 1 else 1,)
    return NoiseConfig(seeds=2, batch_sizes=(1,), workers=workers)


def vary(suite: SuiteConfig, config: NoiseConfig) -> Iterator[tuple[str, int, VariedConfig]]:
    """Yield (kind, value, benchmark) of each benchmark under each other few-shot seed, where it draws examples, batch size and number of
    workers."""
    for benchmark in suite.benchmarks:
        changes = [("seed", "seed", benchmark.seed + n + 1) for n in range(config.seeds) if benchmark.num_fewshot]
        changes += [("batch", "batch_size", size) for size in config.batch_sizes]
        changes += [("workers", "workers", workers) for workers in config.workers]
        for kind, field, value in changes:
            yield kind, value, VariedConfig.model_validate(benchmark.model_dump() | {field: value})
