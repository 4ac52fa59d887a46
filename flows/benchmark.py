"""Any model on any suite, with the numbers on its MLflow run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import flow

from evaluation.config import SuiteConfig
from evaluation.suites import mean_score
from evaluation.verdict import Noise
from flows.align import check_benchmarks
from flows.config import BenchmarkFlowConfig
from infra.settings import Settings, read_settings
from infra.store import Store, open_store
from tasks.evaluate import MirrorConfig, evaluate, mirror
from tasks.execute import Execution
from tasks.noise import plan_noise, read_noise
from tasks.report import list_steps
from tasks.sources import resolve_source
from tasks.step import Given, Planned


@dataclass(frozen=True)
class BenchmarkPlan:
    """The mirror, one evaluation for each benchmark, and where a noise floor is asked for the varied ones and what compares them."""

    files: Planned
    evaluations: list[Planned]
    varied: list[Planned]
    noise: Planned | None


def plan_benchmark(config: BenchmarkFlowConfig, *, store: Store, settings: Settings) -> BenchmarkPlan:
    """Resolve the sources by content and lay out every step."""
    model = resolve_source(config.model, store=store, settings=settings)
    raw = resolve_source(config.benchmarks, store=store, settings=settings)
    files = mirror(MirrorConfig(), {"raw": raw}, runtime=config.runtime)
    inputs: dict[str, Given] = {"model": model, "mirror": files}
    evaluations = {b.name: evaluate(b, inputs, runtime=config.runtime, label=b.name) for b in config.suite.benchmarks}
    floor = plan_noise(
        config.noise, config.suite, model=model, files=files, measured=evaluations, runtime=config.runtime
    )
    varied, noise = floor or ([], None)
    return BenchmarkPlan(files, [*evaluations.values()], varied, noise)


@flow(name="benchmark", persist_result=False)
def benchmark(config: BenchmarkFlowConfig) -> dict[str, Any]:
    """Run a suite on a model. Scores that are on record are not computed again."""
    settings = read_settings()
    plan = plan_benchmark(config, store=open_store(settings), settings=settings)
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        folder = run.folder(run.step(plan.files))
        check_benchmarks(config.suite, source=config.benchmarks, folder=folder)
        run.steps(*plan.evaluations, *plan.varied)
        floor = read_noise(run.folder(run.step(plan.noise))) if plan.noise else {}
        summaries = [run.ref(planned).record.summary for planned in plan.evaluations]
        return collect(config.suite, summaries, floor) | {"steps": list_steps(run)} | run.links


def collect(
    suite: SuiteConfig, summaries: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[Noise]]
) -> dict[str, Any]:
    """Return what the steps' summaries say: scores by metric, why some are suspect, all figures of each benchmark, the mean
    of a whole profile, and how far scores move when the model does not."""
    scores = {name: value for summary in summaries for name, value in summary["metrics"].items()}
    mean = mean_score(suite, {summary["benchmark"]: summary["value"] for summary in summaries})
    if mean is not None:
        scores[f"eval/{mean[0]}/mean"] = mean[1]
    return {
        "scores": scores,
        "flags": {summary["benchmark"]: summary["flag"] for summary in summaries if summary["flag"]},
        "benchmarks": {
            summary["benchmark"]: {name: value for name, value in summary.items() if name != "metrics"}
            for summary in summaries
        },
        "noise": {name: [floor.model_dump(mode="json") for floor in floors] for name, floors in noise.items()},
    }
