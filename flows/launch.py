"""What the command line does with flows: run one here or on the worker, show its plan, find its report and lineage."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flows.align import plan_align
from flows.cancel import cancellable
from flows.config import AlignConfig
from flows.preview import preview
from infra import ledger, records
from infra.records import Record
from infra.settings import Settings
from infra.stack.health import probe
from infra.store import Store, open_store
from infra.tracking import Tracking, read_steps
from tasks.candidate import name_run
from tasks.gate import plan_look
from tasks.mirror import listener
from training.config import Config


def check_servers(settings: Settings) -> None:
    """Raise ValueError when Prefect or MLflow does not answer, before anything is begun."""
    for service, title, variable in (
        ("prefect", "Prefect", "VARFLOW_PREFECT_API_URL"),
        ("mlflow", "MLflow", "VARFLOW_MLFLOW_TRACKING_URI"),
    ):
        if reason := probe(service, settings):  # type: ignore[arg-type]
            raise ValueError(f"{title}: {reason}; start it (`varflow up`), or set {variable} to one that runs")


def plan_recipe(config: AlignConfig, *, settings: Settings) -> list[dict[str, Any]]:
    """Return every step of a recipe with its fingerprint, whether it is cached, and what changed."""
    store = open_store(settings)
    store.probe()
    plan = plan_align(config, store=store, settings=settings)
    plan = plan.at_look(plan_look(plan.gate, store=store, model=config.model_name))
    return preview(plan.steps(), store=store)


def run_here(flow: Flow[Any, Any], config: Config, *, settings: Settings, console: Console) -> dict[str, Any]:
    """Run a flow in this process against the servers, with bars on the console, and return what it returns."""
    check_servers(settings)
    quieten_prefect()
    with StepBars(console) as bars:
        token = listener.set(bars)
        try:
            with cancellable(flow) as run:
                return cast(dict[str, Any], run(config))
        finally:
            listener.reset(token)


def run_on_worker(deployment: str, config: Config, *, settings: Settings) -> dict[str, Any]:
    """Hand a flow to the worker of its deployment and return where to follow it."""
    check_servers(settings)
    parameters = {"config": config.model_dump(mode="json")}
    run = cast(FlowRun, run_deployment(deployment, parameters=parameters, timeout=0, as_subflow=False))
    return {
        "deployment": deployment,
        "run": str(run.id),
        "prefect_run": f"{settings.prefect_ui_url}/runs/flow-run/{run.id}",
    }


def quieten_prefect() -> None:
    """Keep Prefect's log off the console: it goes to the server, the bars say the same, and the command tells of errors."""
    for name in (None, "prefect", "prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            if type(handler).__name__ == "PrefectConsoleHandler":
                handler.setLevel(logging.CRITICAL + 1)  # at ERROR it prints a traceback for each frame it is in


class StepBars:
    """One line for every step that is done, one bar for the one under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=console, transient=True, refresh_per_second=4,
            disable=not console.is_terminal,  # it would draw for nobody
        )  # fmt: skip
        self._bar = self._bars.add_task("starting", total=None, figures="")

    def __enter__(self) -> "StepBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, title: str) -> None:
        """Begin a bar."""
        self._bars.reset(self._bar, description=title, total=None, figures="")

    def progressed(self, title: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        figures = "  ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in list(metrics.items())[:2])
        self._bars.update(self._bar, description=title, completed=done, total=total, figures=figures)

    def finished(self, title: str, *, cached: bool, seconds: float) -> None:
        """Print the line that stays."""
        self._console.print(f"{'cached' if cached else f'{seconds:.1f} s':>9}  {title}", highlight=False, markup=False)


def find_step(store: Store, run: str, *, step: str, tracking: Tracking) -> Record:
    """Return the record of a kind of step, such as report or gate, that a run ended with, written by it or found.

    `run` is its Prefect or MLflow id, the address of one of these pages, or the step's own reference.
    """
    run = name_run(run) or run
    if "/" in run:
        record = records.resolve(store, run)
        if record.step != step:
            raise ValueError(f"reference {run!r}: got a {record.step}, expected {step}/FINGERPRINT, or the id of a run")
        return record
    ref = read_steps(tracking.find_tags(run)).get(step)
    if ref is None:
        made = sorted(records.iterate(store, step), key=lambda record: record.created)
        known = ", ".join(record.prefect_run for record in made[-3:])
        raise ValueError(f"run {run!r}: it has no {step}; the newest {step}s are of the runs {known or '(none)'}")
    return records.resolve(store, ref)


def trace(store: Store, reference: str) -> dict[str, Any]:
    """Return what an artifact came from, back to its sources, and what came of it."""
    everything = list(records.iterate(store))
    start = records.resolve(store, reference)
    by_fingerprint = {record.fingerprint: record for record in everything}

    def upstream(record: Record) -> dict[str, Any]:
        sources = {}
        for name, given in record.inputs.items():
            made = by_fingerprint.get(given)
            sources[name] = upstream(made) if made else {"source": given}
        return describe(record) | {"inputs": sources}

    def downstream(record: Record) -> list[dict[str, Any]]:
        uses = [other for other in everything if record.fingerprint in other.inputs.values()]
        return [describe(other) | {"used_by": downstream(other)} for other in uses]

    return upstream(start) | {"used_by": downstream(start)}


def describe(record: Record) -> dict[str, Any]:
    """Return a record's line in a lineage."""
    return {
        "ref": record.ref,
        "created": record.created,
        "mlflow_run": record.mlflow_run,
        "prefect_run": record.prefect_run,
    }


def push(store: Store, paths: Iterable[Any], *, emit: Any) -> list[dict[str, Any]]:
    """Store batches of preferences and tell Prefect of each; a batch that is there already is told of again."""
    pushed = []
    for path in paths:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(
                f"{path}: got no file with bytes in it; expected preferences as JSON lines, JSON or Parquet"
            )
        digest, new = ledger.receive(store, path)
        emit(event="preferences.landed", resource={"prefect.resource.id": f"prefs.{digest}", "varflow.file": path.name})
        pushed.append({"file": str(path), "digest": digest, "new": new})
    return pushed
