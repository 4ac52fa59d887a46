"""Any model on any suite, with the numbers on its MLflow run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import flow

from evaluation.config import SuiteConfig
from evaluation.gate.verdict import Noise
from evaluation.harness.contamination import Contamination, flag_contamination
from evaluation.suites import fix_batch_size, mean_score
from flows.align import check_benchmarks
from flows.alignment import BASELINE, MODEL, AlignmentPlan, plan_alignment
from flows.config import BenchmarkFlowConfig
from infra.settings import Settings, read_settings
from infra.store import Store, open_store
from tasks.contamination import plan_contamination, read_contamination
from tasks.evaluate import MirrorConfig, evaluate, mirror
from tasks.execute import Execution
from tasks.noise import plan_noise, read_noise
from tasks.report import list_steps
from tasks.sources import resolve_source
from tasks.step import Given, Planned, Source


@dataclass(frozen=True)
class BenchmarkPlan:
    """Every step of one suite on one model, known before anything runs."""

    mirror: Planned | None  # None of a suite without benchmarks
    evaluations: tuple[Planned, ...]
    varied: list[Planned]  # the same under what should not matter, where a noise floor is asked for
    noise: Planned | None  # what compares them
    contamination: Planned | None  # items in what the model was trained on, where that is in the store
    alignment: AlignmentPlan

    def results(self) -> Iterator[Planned]:
        """Yield the steps whose figures are the outcome."""
        yield from (*self.evaluations, *self.alignment.results)


def plan_benchmark(config: BenchmarkFlowConfig, *, store: Store, settings: Settings) -> BenchmarkPlan:
    """Resolve the sources by content and lay out every step. Reads, but computes and writes nothing in the store."""

    def source(reference: str) -> Source:
        return resolve_source(reference, store=store, settings=settings)

    check_suite(config)
    suite, runtime = config.suite, config.runtime
    model, raw = source(config.model), source(config.benchmarks)
    models = {MODEL: (MODEL, model)} | ({BASELINE: (BASELINE, source(config.baseline))} if config.baseline else {})
    alignment = plan_alignment(
        suite.alignment, models=models, scorer=source(config.scorer) if config.scorer else None, scoring=config.scoring,
        files=raw, runtime=runtime, store=store, settings=settings,
    )  # fmt: skip
    if not suite.benchmarks:
        return BenchmarkPlan(None, (), [], None, None, alignment)
    files = mirror(MirrorConfig(), {"raw": raw}, runtime=runtime)
    inputs: dict[str, Given] = {"model": model, "mirror": files}
    benchmarks = [fix_batch_size(b, microbatch_tokens=runtime.microbatch_tokens) for b in suite.benchmarks]
    evaluations = {b.name: evaluate(b, inputs, runtime=runtime, label=b.name) for b in benchmarks}
    floor = plan_noise(config.noise, suite, model=model, files=files, measured=evaluations, runtime=runtime)
    varied, noise = floor or ([], None)
    looked = plan_contamination(model, evaluations, store=store, settings=settings, runtime=runtime)
    return BenchmarkPlan(files, tuple(evaluations.values()), varied, noise, looked, alignment)


def check_suite(config: BenchmarkFlowConfig) -> None:
    """Refuse a suite of nothing, prompt sets that nothing would score, and a baseline that nothing would be asked of."""
    if config.suite.is_empty:
        raise ValueError(
            "suite: has no benchmarks, no prompt sets and no pair sets, so nothing would be run; name some"
        )
    sets = ", ".join(each.title for each in config.suite.alignment.prompt_sets)
    if sets and not config.reward:
        raise ValueError(f"suite: {sets} are scored by a reward model, and none is named; set reward (--reward)")
    if config.baseline and not sets:
        raise ValueError(
            f"baseline {config.baseline!r}: the suite has no prompt sets, so it would be asked nothing; leave it out, or "
            "`varflow compare` the models"
        )


@flow(name="benchmark", persist_result=False)
def benchmark(config: BenchmarkFlowConfig) -> dict[str, Any]:
    """Run a suite on a model. Scores that are on record are not computed again."""
    settings = read_settings()
    plan = plan_benchmark(config, store=open_store(settings), settings=settings)
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        run.steps(*plan.alignment.sets)
        if plan.mirror:
            folder = run.folder(run.step(plan.mirror))
            check_benchmarks(config.suite, source=config.benchmarks, folder=folder)
        run.steps(*plan.evaluations, *plan.varied, *plan.alignment.steps())
        floor = read_noise(run.folder(run.step(plan.noise))) if plan.noise else {}
        seen = read_contamination(run.folder(run.step(plan.contamination))) if plan.contamination else ()
        summaries = [run.ref(planned).record.summary for planned in plan.results()]
        return collect(config.suite, summaries, floor, seen) | {"steps": list_steps(run)} | run.links


def collect(
    suite: SuiteConfig,
    summaries: Sequence[Mapping[str, Any]],
    noise: Mapping[str, Sequence[Noise]],
    contamination: Sequence[Contamination],
) -> dict[str, Any]:
    """Return what the steps' summaries say: scores by metric, why some are suspect, all figures of each benchmark and set, the mean
    of a whole profile, how far scores move when the model does not, and what of the benchmarks the model was trained on."""
    scores = {name: value for summary in summaries for name, value in summary["metrics"].items()}
    mean = mean_score(suite, {summary["benchmark"]: summary["value"] for summary in summaries if "value" in summary})
    if mean is not None:
        scores[f"eval/{mean[0]}/mean"] = mean[1]
    flags = {summary["benchmark"]: summary["flag"] for summary in summaries if summary.get("flag")}
    for found in contamination:
        for flag in flag_contamination(found):
            flags[found.benchmark] = "; ".join(filter(None, [flags.get(found.benchmark), flag]))
    return {
        "scores": scores,
        "flags": flags,
        "benchmarks": {
            summary["benchmark"]: {name: value for name, value in summary.items() if name != "metrics"}
            for summary in summaries
        },
        "contamination": [found.model_dump(mode="json") for found in contamination],
        "noise": {name: [floor.model_dump(mode="json") for floor in floors] for name, floors in noise.items()},
    }
