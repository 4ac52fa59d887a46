"""What Prefect, MLflow, S3 and the records cost, against the same child processes and functions called directly.

`python -m benchmarks.orchestration --json [--recipe demo]` on a running stack (`varflow up`). Every step of the recipe is run
twice, side by side: once by the pipeline, once by calling its function in a bare folder, the order changing from step to
step, so that a machine that slows down slows both. Nothing is cached: the pipeline works under a prefix of its own.

Keys: `pipeline_seconds` (all of it: planning, every step, promotion, the links), `direct_seconds`, `overhead_share` (of the
pipeline). A child process computes the same on both ways, and the difference of two such long times is mostly the machine's noise; so
`direct_seconds` takes the children's time from the pipeline, and everything around them as it was without it. What the pipeline did
while a child was running (following its metrics, sending them to MLflow) counts by the processor time that it took from it.
`measured_direct_seconds` is the bare way as the clock had it.
"""

import argparse
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.settings import child_environment, read_settings

SETTINGS = read_settings()
SETTINGS.apply()  # before Prefect and MLflow are imported

from prefect import flow  # noqa: E402

import evaluation.gate  # noqa: E402 - steps import these late; whichever way came first would pay for both
import evaluation.report  # noqa: E402, F401
from flows.align import AlignPlan, plan_align  # noqa: E402
from flows.config import AlignConfig  # noqa: E402
from flows.launch import quieten_prefect  # noqa: E402
from flows.overrides import override  # noqa: E402
from flows.recipes import read_recipe  # noqa: E402
from infra.store import open_store  # noqa: E402
from tasks.child import ChildJob, run_child  # noqa: E402
from tasks.execute import Execution, read_summary, thread_environment  # noqa: E402
from tasks.promote import promote  # noqa: E402
from tasks.report import publish  # noqa: E402
from tasks.step import Planned, Source  # noqa: E402


class Stopwatch:
    """Sums the seconds spent within `running` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


@dataclass
class BareAttempt:
    """A step's folders and its child, with nothing around them."""

    planned: Planned
    folder: Path
    inputs: Mapping[str, Path]
    execution: Execution  # the report asks it for the steps and links it prints

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return {name: given.fingerprint for name, given in self.planned.inputs.items()}

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        run_child(
            ChildJob(
                package, job, self.planned.config.model_dump(mode="json"), self.planned.runtime.model_dump(mode="json"),
                self.inputs, self.folder, child_environment(thread_environment(self.planned.runtime.threads)),
            ),
            on_metrics=lambda lines: None,
        )  # fmt: skip
        return read_summary(self.output)


class Watched:
    """An attempt whose child is timed, and the processor time that this process takes meanwhile."""

    def __init__(self, attempt: Any, way: "Way") -> None:
        self._attempt, self._way = attempt, way

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attempt, name)

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        cpu = time.process_time()
        with self._way.child.running():
            summary: dict[str, Any] = self._attempt.run_child(package, job)
        self._way.beside_child += time.process_time() - cpu
        return summary


class Way:
    """What one way of running the steps took."""

    def __init__(self) -> None:
        self.total, self.child = Stopwatch(), Stopwatch()
        self.beside_child = 0.0  # processor seconds of this process while children ran

    @property
    def around(self) -> float:
        """Seconds that were not a child's."""
        return self.total.seconds - self.child.seconds


class SideBySide:
    """Runs each step of a plan by the pipeline and bare, and keeps the times."""

    def __init__(self, execution: Execution, *, pipeline: Way, home: Path) -> None:
        self.execution, self.pipeline, self.home = execution, pipeline, home
        self.direct = Way()
        self.outputs: dict[str, Path] = {}
        self.steps: list[dict[str, Any]] = []

    def step(self, planned: Planned) -> None:
        """Run one step both ways; the way that goes first changes each time. The report needs the pipeline's first."""
        ways: list[Callable[[Planned], None]] = [self._by_pipeline, self._bare]
        before = self._times()
        for way in ways if len(self.steps) % 2 == 0 or planned.step.name == "report" else reversed(ways):
            way(planned)
        taken = {name: round(after - before[name], 3) for name, after in self._times().items()}
        self.steps.append({"step": planned.title} | taken)

    def _times(self) -> dict[str, float]:
        return {
            "pipeline_seconds": self.pipeline.total.seconds,
            "direct_seconds": self.direct.total.seconds,
            "overhead_seconds": self.pipeline.around - self.direct.around,
        }

    def _by_pipeline(self, planned: Planned) -> None:
        def watched(config: Any, attempt: Any) -> dict[str, float]:
            return planned.step.work(config, Watched(attempt, self.pipeline))

        with self.pipeline.total.running():
            self.execution.step(replace(planned, step=replace(planned.step, work=watched)))

    def _bare(self, planned: Planned) -> None:
        inputs = {
            name: given.path if isinstance(given, Source) else self.outputs[given.fingerprint]
            for name, given in planned.inputs.items()
        }
        attempt = BareAttempt(planned, self.home / "bare" / planned.fingerprint, inputs, self.execution)
        attempt.output.mkdir(parents=True)
        with self.direct.total.running():
            planned.step.work(planned.config, Watched(attempt, self.direct))
        self.outputs[planned.fingerprint] = attempt.output


@flow(name="orchestration-benchmark", persist_result=False)
def measure(config: AlignConfig, home: str) -> dict[str, Any]:
    """Run a recipe's plan both ways and return the times."""
    pipeline = Way()
    settings = SETTINGS.model_copy(update={"home": Path(home), "s3_prefix": f"benchmarks/{config.name}"})
    with pipeline.total.running():
        plan: AlignPlan = plan_align(config, store=open_store(settings), settings=SETTINGS)
        execution = Execution(settings, experiment=config.name, config=config.model_dump(mode="json")).__enter__()
    both = SideBySide(execution, pipeline=pipeline, home=Path(home))
    for planned in plan.steps():
        both.step(planned)
    with pipeline.total.running():
        verdict, challenger = execution.ref(plan.gate), execution.ref(plan.challenger)
        said = promote(execution, model=config.name, challenger=challenger, over=plan.over, verdict=verdict)
        publish(execution, execution.ref(plan.report), verdict=verdict, promoted=said)
        execution.__exit__(None, None, None)
    direct = both.direct
    beside = max(0.0, pipeline.beside_child - direct.beside_child)
    direct_seconds = pipeline.child.seconds - beside + direct.around
    return {
        "pipeline_seconds": round(pipeline.total.seconds, 3),
        "direct_seconds": round(direct_seconds, 3),
        "overhead_share": round(1 - direct_seconds / pipeline.total.seconds, 5),
        "overhead_seconds": round(pipeline.total.seconds - direct_seconds, 3),
        "beside_child_seconds": round(beside, 3),
        "measured_direct_seconds": round(direct.total.seconds, 3),
        "steps": both.steps,
    }


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    options = parser.parse_args()
    quieten_prefect()
    name = f"orchestration_{uuid.uuid4().hex[:8]}"
    config = override(read_recipe(options.recipe), options.changes).model_copy(
        update={"name": name, "champion": "base"}
    )
    home = SETTINGS.home / "benchmarks" / name
    home.mkdir(parents=True)
    try:
        result = measure(config, str(home))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if not options.json:
        for row in result["steps"]:
            times = (row[name] for name in ("pipeline_seconds", "direct_seconds", "overhead_seconds"))
            print("".join(f"{seconds:9.2f}" for seconds in times) + f"  {row['step']}")
    machine = {"recipe": options.recipe, "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(result | machine))


if __name__ == "__main__":
    main()
