"""What Prefect, MLflow, S3 and the records cost, against the same child processes and functions called directly.

`python -m benchmarks.orchestration --json [--recipe demo]` on a running stack (`varflow up`). Every step of the recipe is run
twice, side by side: once by the pipeline, once by calling its function in a bare folder, the order changing from step to
step, so that a machine that slows down slows both. Nothing is cached: the pipeline works under a prefix of its own.

Keys: `pipeline_seconds` (all of it: planning, every step, promotion, the links), `direct_seconds`, `overhead_share`
(of the pipeline). On a noisy machine the difference of two long times is mostly noise, so the pipeline's own accounting is
printed beside it: `inside_seconds` is the time its steps spent in those same functions, `inside_overhead_share` the rest.
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

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        run_child(
            ChildJob(
                package, job, self.planned.config.model_dump(mode="json"), self.planned.runtime.model_dump(mode="json"),
                self.inputs, self.folder, child_environment(thread_environment(self.planned.runtime.threads)),
            ),
            on_metrics=lambda lines: None,
        )  # fmt: skip
        return read_summary(self.output)


class SideBySide:
    """Runs each step of a plan by the pipeline and bare, and keeps the times."""

    def __init__(self, execution: Execution, *, pipeline: Stopwatch, home: Path) -> None:
        self.execution, self.pipeline, self.home = execution, pipeline, home
        self.direct, self.inside = Stopwatch(), Stopwatch()
        self.outputs: dict[str, Path] = {}
        self.steps: list[dict[str, Any]] = []

    def step(self, planned: Planned) -> None:
        """Run one step both ways; the way that goes first changes each time. The report needs the pipeline's first."""
        ways: list[Callable[[Planned], None]] = [self._by_pipeline, self._bare]
        before = (self.pipeline.seconds, self.direct.seconds, self.inside.seconds)
        for way in ways if len(self.steps) % 2 == 0 or planned.step.name == "report" else reversed(ways):
            way(planned)
        after = (self.pipeline.seconds, self.direct.seconds, self.inside.seconds)
        pipeline, direct, inside = (round(b - a, 3) for a, b in zip(before, after, strict=True))
        row = {"step": planned.title, "pipeline_seconds": pipeline, "direct_seconds": direct, "inside_seconds": inside}
        self.steps.append(row)

    def _by_pipeline(self, planned: Planned) -> None:
        def timed(config: Any, attempt: Any) -> dict[str, float]:
            with self.inside.running():
                return planned.step.work(config, attempt)

        with self.pipeline.running():
            self.execution.step(replace(planned, step=replace(planned.step, work=timed)))

    def _bare(self, planned: Planned) -> None:
        inputs = {
            name: given.path if isinstance(given, Source) else self.outputs[given.fingerprint]
            for name, given in planned.inputs.items()
        }
        attempt = BareAttempt(planned, self.home / "bare" / planned.fingerprint, inputs, self.execution)
        attempt.output.mkdir(parents=True)
        with self.direct.running():
            planned.step.work(planned.config, attempt)
        self.outputs[planned.fingerprint] = attempt.output


@flow(name="orchestration-benchmark", persist_result=False)
def measure(config: AlignConfig, home: str) -> dict[str, Any]:
    """Run a recipe's plan both ways and return the times."""
    pipeline = Stopwatch()
    settings = SETTINGS.model_copy(update={"home": Path(home), "s3_prefix": f"benchmarks/{config.name}"})
    with pipeline.running():
        plan: AlignPlan = plan_align(config, store=open_store(settings), settings=SETTINGS)
        execution = Execution(settings, experiment=config.name, config=config.model_dump(mode="json")).__enter__()
    both = SideBySide(execution, pipeline=pipeline, home=Path(home))
    for planned in plan.steps():
        both.step(planned)
    with pipeline.running():
        verdict, challenger = execution.ref(plan.gate), execution.ref(plan.challenger)
        said = promote(execution, model=config.name, challenger=challenger, over=plan.over, verdict=verdict)
        publish(execution, execution.ref(plan.report), verdict=verdict, promoted=said)
        execution.__exit__(None, None, None)
    return {
        "pipeline_seconds": round(pipeline.seconds, 3),
        "direct_seconds": round(both.direct.seconds, 3),
        "overhead_share": round(1 - both.direct.seconds / pipeline.seconds, 5),
        "inside_seconds": round(both.inside.seconds, 3),
        "inside_overhead_seconds": round(pipeline.seconds - both.inside.seconds, 3),
        "inside_overhead_share": round(1 - both.inside.seconds / pipeline.seconds, 5),
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
            print(
                f"{row['pipeline_seconds']:9.2f} {row['direct_seconds']:9.2f} {row['inside_seconds']:9.2f}  {row['step']}"
            )
    machine = {"recipe": options.recipe, "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(result | machine))


if __name__ == "__main__":
    main()
