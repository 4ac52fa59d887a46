"""Running a plan inside a Prefect flow: found? else work, commit, record, each step one Prefect task and one MLflow run."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, State

from evaluation.config import BenchmarkConfig
from evaluation.judges.config import EndpointJudge, JudgeConfig
from infra import provenance, records
from infra.records import Record
from infra.settings import Settings, child_environment
from infra.store import open_store
from infra.tracking import STEP_TAG, Run, Tracking, describe_step
from tasks.artifacts import (
    count_bytes,
    fetch_artifact,
    lock_folder,
    open_digests,
    place_output,
    read_summary,
    remember_files,
)
from tasks.checkpoints import StoredCheckpoints, cut_metrics, discard_checkpoints
from tasks.child import ChildJob, InputChanged, follow, run_child
from tasks.cost import Spent, price_step, total_costs
from tasks.mirror import MetricsMirror, Notes, give_way, listener
from tasks.samples import SamplesMirror
from tasks.step import ArtifactRef, Metrics, Planned, Source, found
from training.config import Config
from training.job import CPU, HARDWARE_FILE, METRICS_FILE
from training.weights import digest_weights

COMMIT_BESIDE_BYTES = 32 << 20  # a larger artifact is on its way to the store while the next step computes


class Execution:
    """One flow run over a plan. Use it as a context: it opens the parent MLflow run and closes it as things ended."""

    def __init__(self, settings: Settings, *, experiment: str, config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.store = open_store(settings)
        self.tracking = Tracking(settings.mlflow_tracking_uri)
        self.refs: dict[str, ArtifactRef] = {}
        self.done: list[Planned] = []
        self.prefect_run = str(flow_run.id or "")
        self.config, self.experiment_name = dict(config), experiment
        self.parent: Run
        self._notes = Notes()
        self._shown: Metrics = {}
        self._costs: list[Mapping[str, float]] = []
        self._tagged: dict[str, str] = {}
        self._outputs: dict[str, Path] = {}  # by fingerprint: the folders of what was computed here
        self._surplus: list[Path] = []  # those of attempts that came second
        self._stopped = False
        # one thread: records are put in the order of the steps, an input's before that of what was made of it
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit", initializer=give_way)

    def __enter__(self) -> Self:
        self.store.probe()
        location = self.store.url(f"mlflow/{self.experiment_name}")
        self.experiment = self.tracking.ensure_experiment(self.experiment_name, artifact_location=location)
        self.tracking.close_orphans(self.experiment)
        self.parent = self.tracking.start_run(self.experiment, name=str(flow_run.name), tags=self._tags())
        self._notes.tell("the config", partial(self.tracking.log, self.parent.id, params=flatten(self.config)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = kind is not None and not issubclass(kind, Exception)
        if self._stopped:  # whoever asked for it does not wait for an upload; a rerun takes up what is left
            self.store.stop_uploads()
        self._committer.shutdown(cancel_futures=self._stopped)
        error = value or self._find_failure()
        self._notes.tell("the figures of all steps", self._show_all)
        self._finish(self.parent, error)
        self._notes.close()
        for folder in self._surplus:
            shutil.rmtree(folder, ignore_errors=True)
        if error is not None and error is not value:
            raise error

    @property
    def links(self) -> dict[str, str]:
        """Pages of this run: Prefect's and MLflow's."""
        return {"prefect_run": self.prefect_url, "mlflow_run": self.tracking.run_url(self.parent)}

    @property
    def prefect_url(self) -> str:
        return f"{self.settings.prefect_ui_url}/runs/flow-run/{self.prefect_run}"

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
        if failure := self._find_failure():  # of a commit that was left to itself: nothing more is started
            raise failure

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
            ref = found(record, seconds=time.monotonic() - started)
            message = f"found {planned.step.name}/{fingerprint[:12]}, computed {record.created}"
            return Completed(name="Cached", message=message, data=ref)

        hear = listener.get()
        if hear:
            hear.started(planned.title)
        state: State[ArtifactRef] = execute(planned.fingerprint, return_state=True)
        ref: ArtifactRef = state.result()
        self.refs[planned.fingerprint] = ref
        self.done.append(planned)
        if ref.cached:
            self._mirror(planned, ref.record)
        if hear:
            hear.finished(planned.title, cached=ref.cached, seconds=ref.seconds)
        return ref

    def folder(self, ref: ArtifactRef | Record) -> Path:
        """Return the local folder of an artifact, fetched from the store the first time."""
        if ref.fingerprint in self._outputs:
            return self._outputs[ref.fingerprint]
        record = ref.record if isinstance(ref, ArtifactRef) else ref
        return fetch_artifact(self.store, record, home=self.settings.home)

    def _compute(self, planned: Planned) -> ArtifactRef:
        work_folder = self._work_folder(planned)
        with ExitStack() as held:
            lock = held.enter_context(lock_folder(work_folder))
            record = self.find(planned)  # another flow of this machine may have finished it while this one waited
            if record is not None:
                return found(record, seconds=0.0)
            started = time.monotonic()
            run = self.tracking.start_run(
                self.experiment, name=planned.title, tags=self._tags(planned), parent=self.parent.id
            )
            with self._closing(run):
                output = place_output(work_folder, home=self.settings.home)
                spent = Spent(work_folder / "spent.json")
                attempt = StepAttempt(planned, self, run, work_folder, output, lock, self.input_folders(planned), spent)
                params = flatten(planned.config.model_dump(mode="json"))
                self._notes.tell(f"the config of {planned.title}", partial(self.tracking.log, run.id, params=params))
                with self._keeping_nothing(planned, output), spent:
                    metrics = planned.step.work(planned.config, attempt)
            made = Made(output, metrics, spent.seconds, attempt.hardware, attempt.inputs)
            commit = self._committer.submit(self._commit, planned, run, made)
            commit.add_done_callback(partial(self._release, held.pop_all(), run))
        if count_bytes(output) <= COMMIT_BESIDE_BYTES:
            commit.result()
        self._outputs[planned.fingerprint] = output
        return ArtifactRef(planned.step.name, planned.fingerprint, False, time.monotonic() - started, commit)

    def _commit(self, planned: Planned, run: Run, made: "Made") -> Record:
        """Upload the files to the run's own place and put the record; then let go of the work folder."""
        output, metrics = made.output, made.metrics
        with self._closing(run):
            for needed in planned.inputs.values():
                if isinstance(needed, Planned):
                    self.ref(needed).commit.result()  # done before this began; raises if it failed
            digests = open_digests(self.settings)
            with self._keeping_nothing(planned, output):
                given = {
                    name: self._describe_input(planned, name, path, digest=digests.of(path))
                    for name, path in made.inputs.items()
                }
            prefix, summary = self.store.name_of(run.artifact_uri), read_summary(output)
            usd_per_hour = self.settings.usd_per_hour
            cost, facts = price_step(made.hardware, summary, seconds=made.seconds, usd_per_hour=usd_per_hour)
            record = Record(
                step=planned.step.name,
                version=planned.step.version,
                fingerprint=planned.fingerprint,
                identity=planned.identity,
                inputs=planned.identity["inputs"],
                given=given,
                attempt=output.name,
                prefix=prefix,
                files=tuple(self.store.upload_folder(output, prefix)),
                summary=summary | {"metrics": metrics},
                provenance=provenance.describe() | facts,
                cost=cost,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                mlflow_run=run.id,
                prefect_run=self.prefect_run,
            )
            remember_files(output, record.files, digests=digests)
            winner = records.commit(self.store, record)
        if not records.is_same_attempt(winner, record):
            self._surplus.append(output)  # what reads it now may go on: both are of one fingerprint
        shutil.rmtree(self._work_folder(planned), ignore_errors=True)
        discard_checkpoints(self.store, planned)
        tags = {"varflow.record": winner.ref}
        paid = {"cost/usd": cost["usd"]} if "usd" in cost else {}
        figures = partial(self.tracking.log, run.id, metrics=points(metrics | paid), tags=tags)
        self._notes.tell(f"the figures of {planned.title}", figures)
        self._finish(run, None)
        self._mirror(planned, winner, computed=True)
        return winner

    def _describe_input(self, planned: Planned, name: str, path: Path, *, digest: str) -> records.Given:
        """Return name and digest of what a step read at `path`: of this flow's own files, even where another's were recorded.

        Raises InputChanged where the plan, or the input's record, says another digest than the files there have now.
        """
        given = planned.inputs[name]
        if isinstance(given, Source):
            source, expected = given.name, given.content or given.digest
        else:
            ref = self.ref(given)
            source, expected = ref.name, records.digest_files(ref.record) if path.name == ref.record.attempt else digest
        if digest != expected:
            raise InputChanged(
                f"{planned.title}: its input {name}, {source} at {path}, has digest {digest[:12]}, expected {expected[:12]}: it was "
                "changed after the plan was made, and what was computed of it is dropped; put it back, or leave it as it is, and run "
                "the same again"
            )
        return records.Given(name=source, digest=digest)

    def _work_folder(self, planned: Planned) -> Path:
        return self.settings.home / "work" / planned.step.name / planned.fingerprint

    @contextmanager
    def _keeping_nothing(self, planned: Planned, output: Path) -> Iterator[None]:
        """Remove what a step made of a changed input: the same run again would take it up."""
        try:
            yield
        except InputChanged:
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(self._work_folder(planned), ignore_errors=True)
            discard_checkpoints(self.store, planned)
            raise

    @contextmanager
    def _closing(self, run: Run) -> Iterator[None]:
        """Close a run when what is done for it fails."""
        try:
            yield
        except BaseException as error:
            self._finish(run, error)
            raise

    def _release(self, held: ExitStack, run: Run, commit: "Future[Record]") -> None:
        """Let go of the lock of a work folder when its commit has ended, or was not begun."""
        held.close()
        if commit.cancelled():
            self._finish(run, KeyboardInterrupt())

    def _find_failure(self) -> BaseException | None:
        """Return what the first failed commit failed with."""
        ended = [ref.commit for ref in self.refs.values() if ref.commit.done() and not ref.commit.cancelled()]
        return next((error for commit in ended if (error := commit.exception())), None)

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

    def _mirror(self, planned: Planned, record: Record, *, computed: bool = False) -> None:
        """Show a step's figures on the parent run too, where runs are compared; a cached step links to its run.

        What cached steps have to say goes in one request, since there may be nothing else to wait for.
        """
        metrics = {place_metric(name, planned.label): value for name, value in record.summary["metrics"].items()}
        # MLflow's tables go by the alphabet: the seconds of each step come last, behind what runs are compared for
        metrics[f"wall_seconds/{planned.key}"] = record.cost["wall_seconds"]
        said = describe_step(record.ref, run=record.mlflow_run, computed=computed)

        def show() -> None:
            self._shown |= metrics
            self._costs.append(record.cost)
            self._tagged[STEP_TAG + planned.key] = said
            if computed:
                self._show()

        self._notes.tell(f"{planned.title} on the parent run", show)

    def _show(self) -> None:
        """Send what `_mirror` gathered; kept for the next time where it is not taken."""
        self.tracking.log(self.parent.id, metrics=points(self._shown), tags=self._tagged)
        self._shown, self._tagged = {}, {}

    def _show_all(self) -> None:
        """Send what is left to say, and what all steps cost, whenever they were computed."""
        total = total_costs(self._costs)
        self._shown["cost/wall_seconds"] = total.seconds
        if total.usd is not None:
            self._shown |= {"cost/usd": total.usd, "cost/unpriced_seconds": total.unpriced_seconds}
        self._show()

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

    def _finish(self, run: Run, error: BaseException | None) -> None:
        """Close a run, once all that is to be told about it has been."""
        stopped = self._stopped or not isinstance(error, Exception)
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        self._notes.tell(f"the end of run {run.id}", partial(self.tracking.finish, run.id, status=status))


@dataclass(frozen=True)
class Made:
    """What an attempt left to commit: its files and figures, how long it computed, on what device, and of which folders."""

    output: Path
    metrics: Metrics
    seconds: float
    hardware: Mapping[str, Any]
    inputs: Mapping[str, Path]


@dataclass
class StepAttempt:
    """One attempt at a step: the folders its function sees, and the supervised child."""

    planned: Planned
    execution: Execution
    run: Run
    folder: Path
    output: Path
    lock: int
    inputs: Mapping[str, Path]
    spent: Spent
    hardware: Mapping[str, Any] = field(default_factory=lambda: CPU)  # what the child computed on, if there was one

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What the inputs are, by name."""
        return {name: given.fingerprint for name, given in self.planned.inputs.items()}

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        """Run `python -m <package>` on a job with this step's config, inputs and output; return its summary.

        What an earlier attempt finished but could not commit is taken as it is, and told again: this attempt's MLflow run is the record's.
        """
        tracking, store = self.execution.tracking, self.execution.store
        mirror = MetricsMirror(tracking, run=self.run.id, title=self.planned.title)
        samples = SamplesMirror(self.output, store=store, tracking=tracking, run=self.run)
        if (self.output / "summary.json").exists():
            mirror(next(follow(self.output / METRICS_FILE)))
        else:
            with StoredCheckpoints(store, self.planned, self.folder) as checkpoints:
                cut_metrics(self.folder)

                def heed(lines: list[dict[str, float]]) -> None:
                    mirror(lines)
                    samples()
                    checkpoints()
                    self.spent.keep()

                child = ChildJob(
                    package=package,
                    name=job,
                    config=self.planned.config.model_dump(mode="json"),
                    runtime=self.planned.runtime.model_dump(mode="json"),
                    inputs=self.inputs,
                    folder=self.folder,
                    environment=child_environment(thread_environment(self.planned.runtime.threads)),
                    stdin=tell_endpoint(self.planned.config, settings=self.execution.settings),
                )
                try:
                    run_child(child, keep_fds=(self.lock,), on_metrics=heed)
                finally:
                    mirror.deliver()  # the figures before a failure are those that people look for
        mirror.close()
        samples.close()
        noted = self.folder / "work" / HARDWARE_FILE
        if noted.exists():
            self.hardware = json.loads(noted.read_text())
        return read_summary(self.output)

    def check_weights(self, name: str, read: str) -> None:
        """Raise InputChanged unless the weights that the child read, by its digest of them, are those of the input `name`.

        Those are the files that lie there now, which the commit holds to the plan: a folder that was exchanged and put back is seen here.
        """
        folder = self.inputs[name]
        there = digest_weights(folder, digest=open_digests(self.execution.settings).of)
        if read != there:
            raise InputChanged(
                f"{self.planned.title}: its input {name}, {folder}: weights with digest {read[:12]} were read, expected {there[:12]}, "
                "which are there now: they were exchanged meanwhile, and what was computed is dropped; run the same again"
            )


def tell_endpoint(config: Config, *, settings: Settings) -> str:
    """Return key and address of the endpoint that a step asks, a line each; empty for a step that asks none."""
    if isinstance(config, JudgeConfig) and isinstance(config.judge, EndpointJudge):
        key, url = settings.judge_api_key, settings.require_judge_url()
    elif isinstance(config, BenchmarkConfig) and config.endpoint is not None:
        key, url = settings.endpoint_key, config.endpoint.url
    else:
        return ""
    return f"{key.get_secret_value() if key else ''}\n{url}\n"


def place_metric(name: str, label: str) -> str:
    """Return a step's metric as the parent run has it: the challenger's figures, the ones to compare, go without, the
    champion's stand beside them in MLflow's tables, and those of a set below its name where they do not have it themselves."""
    what, _, whose = label.rpartition(" ")
    if whose in {"noise", "preferences"}:
        return f"{whose}/{name}"
    below = f"{what}/" if what and not name.startswith("eval/") else ""
    beside = f"_{whose}" if whose in {"champion", "baseline"} else ""
    return f"{below}{name}{beside}"


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
