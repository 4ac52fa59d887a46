"""What Prefect, MLflow, S3 and the records cost, against the same child processes and functions called directly.

`python -m benchmarks.orchestration --json [--recipe demo]` on a running stack (`varflow up`), Linux only. The recipe is run by the
pipeline, then each of its steps again by calling its function in a bare folder. Nothing is cached: the pipeline works under a
prefix of its own.

Keys: `pipeline_seconds` (all of it: planning, every step, promotion, the links), `direct_seconds`, `overhead_share` (of the
pipeline). A child process computes the same on both ways, and the difference of two such long times is mostly the machine's noise; so
`direct_seconds` takes the children's time from the pipeline, and everything around them as it was without it. What goes on beside a
child (its metrics on their way to MLflow, a model on its way to S3) counts by the time that the child's threads were ready to run and
had to wait for a core (`/proc/PID/task/TID/schedstat`), summed over its threads, above what they waited on the bare way.
`measured_direct_seconds` is the bare way as the clock had it.
"""

import argparse
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from infra.settings import child_environment, read_settings

SETTINGS = read_settings()
SETTINGS.apply()  # before Prefect and MLflow are imported

from prefect import flow  # noqa: E402

import evaluation.gate.decide  # noqa: E402 - steps import these late; whichever way came first would pay for both
import evaluation.pages.report  # noqa: E402, F401
from flows.align import AlignPlan, plan_align  # noqa: E402
from flows.config import AlignConfig  # noqa: E402
from flows.launch import quieten_prefect  # noqa: E402
from flows.overrides import override  # noqa: E402
from flows.recipes import read_recipe  # noqa: E402
from infra.store import open_store  # noqa: E402
from tasks.artifacts import read_summary  # noqa: E402
from tasks.child import ChildJob, run_child  # noqa: E402
from tasks.execute import Execution, thread_environment  # noqa: E402
from tasks.promote import promote  # noqa: E402
from tasks.report import publish  # noqa: E402
from tasks.step import Planned, Source  # noqa: E402

SAMPLE_SECONDS = 0.25


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


class CoreWaits:
    """Sums the seconds that the threads of this process's children were ready to run and had no core, while `watched`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        ended, waits = threading.Event(), {}

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                waits.update(read_core_waits())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.seconds += sum(waits.values()) / 1e9


def read_core_waits() -> dict[tuple[int, str], int]:
    """Return the nanoseconds that each thread of every descendant has waited for a core so far, by process and thread."""
    waits = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError):  # it has just ended
            for task in (Path("/proc") / str(process.pid) / "task").iterdir():
                waits[process.pid, task.name] = int((task / "schedstat").read_text().split()[1])
    return waits


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

    def check_weights(self, name: str, read: str) -> None:
        """Compare nothing: that is a part of what is measured."""


class Watched:
    """An attempt whose child is timed, and what it waits for a core."""

    def __init__(self, attempt: Any, way: "Way") -> None:
        self._attempt, self._way = attempt, way

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attempt, name)

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        with self._way.child.running(), self._way.waits.watched():
            summary: dict[str, Any] = self._attempt.run_child(package, job)
        return summary


class Way:
    """What one way of running the steps took."""

    def __init__(self) -> None:
        self.total, self.child, self.waits = Stopwatch(), Stopwatch(), CoreWaits()

    @property
    def around(self) -> float:
        """Seconds that were not a child's."""
        return self.total.seconds - self.child.seconds


class BothWays:
    """Runs the steps of a plan by the pipeline, then bare, and keeps the times of each."""

    def __init__(self, execution: Execution, *, pipeline: Way, home: Path) -> None:
        self.execution, self.pipeline, self.home = execution, pipeline, home
        self.direct = Way()
        self.outputs: dict[str, Path] = {}
        self.steps: list[dict[str, Any]] = []

    def run(self, planned: list[Planned]) -> None:
        """Run all steps one way, then the other: the pipeline's uploads are done beside its own next step."""
        times = {}
        for name, way, run_step in (
            ("pipeline", self.pipeline, self._by_pipeline),
            ("direct", self.direct, self._bare),
        ):
            for step in planned:
                before = (way.total.seconds, way.around, way.waits.seconds)
                run_step(step)
                after = (way.total.seconds, way.around, way.waits.seconds)
                times[name, step.fingerprint] = [end - start for start, end in zip(before, after, strict=True)]
        for step in planned:
            pipeline, direct = times["pipeline", step.fingerprint], times["direct", step.fingerprint]
            figures = {
                "pipeline_seconds": pipeline[0],
                "direct_seconds": direct[0],
                "around_seconds": pipeline[1] - direct[1],
                "core_wait_seconds": pipeline[2] - direct[2],
            }
            self.steps.append({"step": step.title} | {name: round(seconds, 3) for name, seconds in figures.items()})

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
    both = BothWays(execution, pipeline=pipeline, home=Path(home))
    both.run(list(plan.steps()))
    with pipeline.total.running():
        verdict, challenger = execution.ref(plan.gate), execution.ref(plan.challenger)
        said = promote(execution, model=config.name, challenger=challenger, verdict=verdict)
        publish(execution, execution.ref(plan.report), verdict=verdict, promoted=said)
        execution.__exit__(None, None, None)
    direct = both.direct
    beside = max(0.0, pipeline.waits.seconds - direct.waits.seconds)
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
            times = (seconds for name, seconds in row.items() if name != "step")
            print("".join(f"{seconds:9.2f}" for seconds in times) + f"  {row['step']}")
    machine = {"recipe": options.recipe, "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(result | machine))


if __name__ == "__main__":
    main()
