"""Running a plan inside a Prefect flow: found? else work, commit, record, each step one Prefect task and one MLflow run."""

import fcntl
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, State

from infra import provenance, records
from infra.fingerprint import Digests
from infra.records import Record
from infra.settings import Settings, child_environment
from infra.store import Store, StoredFile, open_store
from infra.tracking import Run, Tracking, TrackingError
from tasks.child import ChildJob, run_child
from tasks.mirror import MetricsMirror, listener
from tasks.step import ArtifactRef, Metrics, Planned, Source


class Execution:
    """One flow run over a plan. Use it as a context: it opens the parent MLflow run and closes it as things ended."""

    def __init__(self, settings: Settings, *, experiment: str, config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.store = open_store(settings)
        self.tracking = Tracking(settings.mlflow_tracking_uri)
        self.refs: dict[str, ArtifactRef] = {}
        self.done: list[Planned] = []
        self._shown: Metrics = {}
        self._tagged: dict[str, str] = {}
        self.prefect_run = str(flow_run.id or "")
        self.config, self.experiment_name = dict(config), experiment
        self.parent: Run

    def __enter__(self) -> Self:
        self.store.probe()
        location = self.store.url(f"mlflow/{self.experiment_name}")
        self.experiment = self.tracking.ensure_experiment(self.experiment_name, artifact_location=location)
        self.tracking.close_orphans(self.experiment)
        self.parent = self.tracking.start_run(self.experiment, name=str(flow_run.name), tags=self._tags())
        self.tracking.log(self.parent.id, params=flatten(self.config))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        self._finish(self.parent, kind)

    @property
    def links(self) -> dict[str, str]:
        """Pages of this run: Prefect, MLflow, and where the store holds it."""
        return {"prefect_run": self.prefect_url, "mlflow_run": self.tracking.run_url(self.parent)}

    @property
    def prefect_url(self) -> str:
        return f"{self.settings.prefect_api_url.removesuffix('/api')}/runs/flow-run/{self.prefect_run}"

    def find(self, planned: Planned) -> Record | None:
        """Return the record of a planned step that is done already."""
        return records.find(self.store, step=planned.step.name, fingerprint=planned.fingerprint)

    def ref(self, planned: Planned) -> ArtifactRef:
        """Return the artifact of a step that has been run here."""
        return self.refs[planned.fingerprint]

    def steps(self, *items: Planned | Source) -> None:
        """Bring several steps to their artifacts, one after the other; sources are there already."""
        for item in items:
            if isinstance(item, Planned):
                self.step(item)

    def step(self, planned: Planned) -> ArtifactRef:
        """Bring a step to its artifact as one Prefect task, whose inputs have been run before. A found one is *Cached*."""
        if planned.fingerprint in self.refs:
            return self.refs[planned.fingerprint]

        @task(
            name=planned.step.name,
            task_run_name=planned.title,
            description=planned.step.description,
            persist_result=False,  # the record is the result; Prefect's own cache ends with the run
            cache_policy=NO_CACHE,
        )
        def execute(fingerprint: str) -> Any:
            started = time.monotonic()
            record = self.find(planned)
            if record is None:
                return self._compute(planned)
            seconds = time.monotonic() - started
            message = f"found {planned.step.name}/{fingerprint[:12]}, computed {record.created}"
            return Completed(name="Cached", message=message, data=ArtifactRef(record, True, seconds))

        hear = listener.get()
        if hear:
            hear.started(planned.title)
        state: State[ArtifactRef] = execute(planned.fingerprint, return_state=True)
        ref: ArtifactRef = state.result()
        self.refs[planned.fingerprint] = ref
        self.done.append(planned)
        self._mirror(planned, ref)
        if hear:
            hear.finished(planned.title, cached=ref.cached, seconds=ref.seconds)
        return ref

    def folder(self, ref: ArtifactRef | Record) -> Path:
        """Return the local folder of an artifact, fetched from the store the first time."""
        record = ref.record if isinstance(ref, ArtifactRef) else ref
        return fetch_artifact(self.store, record, home=self.settings.home)

    def _compute(self, planned: Planned) -> ArtifactRef:
        work_folder = self.settings.home / "work" / planned.step.name / planned.fingerprint
        with lock_folder(work_folder) as lock:
            record = self.find(planned)  # another flow of this machine may have finished it while this one waited
            if record is not None:
                return ArtifactRef(record, True, 0.0)
            started = time.monotonic()
            run = self.tracking.start_run(
                self.experiment, name=planned.title, tags=self._tags(planned), parent=self.parent.id
            )
            kind: type[BaseException] | None = None
            try:
                attempt = StepAttempt(planned, self, run, work_folder, lock, self.input_folders(planned))
                self.tracking.log(run.id, params=flatten(planned.config.model_dump(mode="json")))
                metrics = planned.step.work(planned.config, attempt)
                record = self._commit(planned, run, attempt.output, metrics, seconds=time.monotonic() - started)
                self.tracking.log(
                    run.id, metrics=points(metrics), tags={"varflow.record": f"{record.step}/{record.fingerprint}"}
                )
            except BaseException as error:
                kind = type(error)
                raise
            finally:
                self._finish(run, kind)
            shutil.rmtree(work_folder, ignore_errors=True)
        return ArtifactRef(record, False, time.monotonic() - started)

    def _commit(self, planned: Planned, run: Run, output: Path, metrics: Metrics, *, seconds: float) -> Record:
        """Upload the files to the run's own place, put the record, keep the files as the local copy."""
        prefix = self.store.name_of(run.artifact_uri)
        files: list[StoredFile] = self.store.upload_folder(output, prefix)
        record = Record(
            step=planned.step.name,
            version=planned.step.version,
            fingerprint=planned.fingerprint,
            identity=planned.identity,
            inputs=planned.identity["inputs"],
            attempt=uuid.uuid4().hex,
            prefix=prefix,
            files=tuple(files),
            summary=read_summary(output) | {"metrics": metrics},
            provenance=provenance.describe(),
            cost={"wall_seconds": round(seconds, 3)},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            mlflow_run=run.id,
            prefect_run=self.prefect_run,
        )
        winner = records.commit(self.store, record)
        if winner.attempt == record.attempt:
            keep_artifact(output, record, home=self.settings.home)
        return winner

    def input_folders(self, planned: Planned) -> dict[str, Path]:
        """Return the local folders of what a step takes, whose own steps have been run here."""
        folders: dict[str, Path] = {}
        for name, given in planned.inputs.items():
            if isinstance(given, Source):
                folders[name] = given.path
            else:
                assert given.fingerprint in self.refs, f"{planned.title} was started before {given.title}"
                folders[name] = self.folder(self.refs[given.fingerprint])
        return folders

    def _mirror(self, planned: Planned, ref: ArtifactRef) -> None:
        """Show a step's figures on the parent run too, where runs are compared; a cached step links to its run.

        What cached steps have to say goes in one request, since there may be nothing else to wait for.
        """
        whose = planned.label.rpartition(" ")[2]  # the challenger's figures, the ones to compare, go without
        prefix = f"{whose}/" if whose in {"champion", "noise", "preferences"} else ""
        metrics = {f"{prefix}{name}": value for name, value in ref.record.summary["metrics"].items()}
        metrics[f"cost/{planned.key}_seconds"] = ref.record.cost["wall_seconds"]
        self._shown |= metrics
        state = "cached" if ref.cached else "computed"
        self._tagged[f"step.{planned.key}"] = f"{state} {ref.name} run {ref.record.mlflow_run}"
        if not ref.cached:
            self._show()

    def _show(self) -> None:
        """Send what `_mirror` gathered; a server that is away costs the mirror, not the run."""
        try:
            self.tracking.log(self.parent.id, metrics=points(self._shown), tags=self._tagged)
        except TrackingError as error:
            get_run_logger().warning("the parent run shows less than was done: %s", error)
            return
        self._shown, self._tagged = {}, {}

    def _tags(self, planned: Planned | None = None) -> dict[str, str]:
        facts = provenance.describe()
        tags = {
            "varflow.host": facts["host"],
            "git.commit": facts["commit"],
            "prefect.run": self.prefect_url,
        }
        if planned:
            tags |= {"varflow.step": planned.step.name, "varflow.fingerprint": planned.fingerprint}
        return tags

    def _finish(self, run: Run, kind: type[BaseException] | None) -> None:
        """Close a run; a server that is away delays it, but a result that is recorded stays a result."""
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            self.tracking.finish(run.id, status=status)
        except TrackingError as error:
            get_run_logger().warning("run %s could not be closed as %s: %s", run.id, status, error)


@dataclass
class StepAttempt:
    """One attempt at a step: the folders its function sees, and the supervised child."""

    planned: Planned
    execution: Execution
    run: Run
    folder: Path
    lock: int
    inputs: Mapping[str, Path]
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.folder / "output"
        self.output.mkdir(parents=True, exist_ok=True)

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What the inputs are, by name."""
        return {name: given.fingerprint for name, given in self.planned.inputs.items()}

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        """Run `python -m <package>` on a job with this step's config, inputs and output; return its summary.

        What an earlier attempt finished but could not commit is taken as it is.
        """
        if not (self.output / "summary.json").exists():
            mirror = MetricsMirror(self.execution.tracking, run=self.run.id, title=self.planned.title)
            run_child(
                ChildJob(
                    package=package,
                    name=job,
                    config=self.planned.config.model_dump(mode="json"),
                    runtime=self.planned.runtime.model_dump(mode="json"),
                    inputs=self.inputs,
                    folder=self.folder,
                    environment=child_environment(thread_environment(self.planned.runtime.threads)),
                ),
                keep_fds=(self.lock,),
                on_metrics=mirror,
            )
            mirror.close()
        return read_summary(self.output)


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Hold the one lock of a work folder on this machine; yields its descriptor for a child to keep it alive with.

    The kernel drops the lock when the last process that holds the descriptor is gone, so nothing can be left locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def fetch_artifact(store: Store, record: Record, *, home: Path) -> Path:
    """Return the local folder with an artifact's files, fetched and checked by digest the first time."""
    folder = home / "artifacts" / record.attempt
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.download_folder(record.prefix, list(record.files), folder)
    return folder


def keep_artifact(output: Path, record: Record, *, home: Path) -> None:
    """Move the files just uploaded to where `fetch_artifact` looks."""
    folder = home / "artifacts" / record.attempt
    folder.parent.mkdir(parents=True, exist_ok=True)
    output.rename(folder)


def read_summary(output: Path) -> dict[str, Any]:
    """Return an artifact's summary, empty where its step writes none."""
    path = output / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def thread_environment(threads: int | None) -> dict[str, str]:
    """Return the variables that bound a child's threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}


def points(metrics: Mapping[str, float]) -> list[tuple[str, float, int, int]]:
    """Return metrics as points of now, step 0."""
    now = int(time.time() * 1000)
    return [(name, float(value), now, 0) for name, value in metrics.items()]


def flatten(config: Mapping[str, Any], *, at: str = "") -> dict[str, Any]:
    """Return nested config as `a.b.c: value`, as MLflow shows parameters; lists as JSON."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, at=f"{at}{name}.")
        else:
            flat[f"{at}{name}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def open_digests(settings: Settings) -> Digests:
    """Return the memory of digests in the home."""
    return Digests(settings.home / "digests.sqlite")
