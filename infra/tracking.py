"""MLflow: one parent run a flow run, one child run a computing step, explicit ids, no global active run.

MLflow owns comparison. It is a mirror: the truth of a step is its record, the truth of a metric its local file. Values that
may change between attempts are tags, since MLflow's params cannot change. NaN and inf never reach it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Metric, Param, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking.client import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from infra.provenance import is_gone, name_process

STEP_TAG = "step."  # of a parent run; behind it the key of a step
PROCESS_TAG = "varflow.process"  # of every run: who is to close it
METRICS_A_BATCH = 1000  # MLflow's limit on one log_batch
PARAMS_A_BATCH = 100
PARAM_CHARS = 6000
TAG_CHARS = 8000  # MLflow's limit


def describe_step(ref: str, *, run: str, computed: bool) -> str:
    """Return what the tag of a step says of its record."""
    return f"{'computed' if computed else 'cached'} {ref} run {run}"


def read_steps(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the references of the records of a run's steps by their keys, from its tags."""
    return {key.removeprefix(STEP_TAG): said.split()[1] for key, said in tags.items() if key.startswith(STEP_TAG)}


class TrackingError(Exception):
    """MLflow refused or could not be reached."""


@dataclass(frozen=True)
class Run:
    """A run and the place of its artifacts."""

    id: str
    experiment: str
    artifact_uri: str


class Tracking:
    """A client of one MLflow server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._client = MlflowClient(tracking_uri=self.uri)

    def ensure_experiment(self, name: str, *, artifact_location: str) -> str:
        """Return the id of an experiment, making it with this `s3://` location where there is none.

        Raises TrackingError when it exists with its artifacts elsewhere, since records and MLflow would then point apart.
        """
        found = self._ask(lambda: self._client.get_experiment_by_name(name))
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifact_location))
            except MlflowException:  # another flow made it first
                found = self._ask(lambda: self._client.get_experiment_by_name(name))
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._ask(lambda: self._client.restore_experiment(found.experiment_id))
        if found.artifact_location.rstrip("/") != artifact_location.rstrip("/"):
            raise TrackingError(
                f"MLflow experiment {name!r} at {self.uri}: its artifacts lie at {found.artifact_location}, expected "
                f"{artifact_location}; use the bucket and prefix it was made with, or rename the experiment"
            )
        return str(found.experiment_id)

    def start_run(self, experiment: str, *, name: str, tags: Mapping[str, str], parent: str | None = None) -> Run:
        """Create a run in state RUNNING; `parent` makes it a child."""
        tags = (
            dict(tags) | ({"mlflow.parentRunId": parent} if parent else {}) | {PROCESS_TAG: json.dumps(name_process())}
        )
        tags = {key: value[:TAG_CHARS] for key, value in tags.items()}
        run = self._ask(lambda: self._client.create_run(experiment, run_name=name, tags=tags))
        return Run(run.info.run_id, experiment, run.info.artifact_uri)

    def log(
        self,
        run: str,
        *,
        metrics: Iterable[tuple[str, float, int, int]] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write metrics (name, value, unix milliseconds, step), params and tags in as few requests as may be.

        The same point with the same time may be written again without becoming two.
        """
        points = [Metric(name, value, at, step) for name, value, at, step in metrics if math.isfinite(value)]
        pairs = [Param(key, str(value)[:PARAM_CHARS]) for key, value in (params or {}).items()]
        labels = [RunTag(key, str(value)[:TAG_CHARS]) for key, value in (tags or {}).items()]
        while points or pairs or labels:
            head, points = points[: METRICS_A_BATCH - PARAMS_A_BATCH], points[METRICS_A_BATCH - PARAMS_A_BATCH :]
            first, pairs = pairs[:PARAMS_A_BATCH], pairs[PARAMS_A_BATCH:]
            self._ask(lambda h=head, p=first, t=labels: self._client.log_batch(run, metrics=h, params=p, tags=t))
            labels = []

    def show_table(self, run: str, name: str) -> None:
        """Say that an artifact of a run is a table of `columns` and `data`, so that MLflow shows it as one."""
        self.log(run, tags={MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": name, "type": "table"}])})

    def finish(self, run: str, *, status: str) -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        assert status in {"FINISHED", "FAILED", "KILLED"}, status
        self._ask(lambda: self._client.set_terminated(run, status=status))

    def close_orphans(self, experiment: str) -> list[str]:
        """Mark KILLED every RUNNING run whose process was on this host and is gone; return their ids.

        A flow ended by SIGKILL cannot close its own runs.
        """
        runs = self._ask(
            lambda: self._client.search_runs(
                [experiment],
                f"attributes.status = 'RUNNING' and tags.`{PROCESS_TAG}` LIKE '%'",
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=200,
            )
        )
        orphans = [run.info.run_id for run in runs if is_gone(json.loads(run.data.tags[PROCESS_TAG]))]
        for run in orphans:
            self.finish(run, status=RunStatus.to_string(RunStatus.KILLED))
        return orphans

    def find_tags(self, run: str) -> dict[str, str]:
        """Return the tags of the run with this id, or of the parent run of the Prefect flow run with it; {} without one."""
        experiments = [found.experiment_id for found in self._ask(self._client.search_experiments)]
        for condition in (f"attributes.run_id = '{run}'", f"tags.`prefect.run` LIKE '%/{run}'"):
            runs = self._ask(lambda c=condition: self._client.search_runs(experiments, c, max_results=1000))
            for found in runs:
                if "mlflow.parentRunId" not in found.data.tags:
                    return dict(found.data.tags)
        return {}

    def run_url(self, run: Run, *, artifact: str = "") -> str:
        """Return the page of a run, or of one of its artifacts.

        Without the last words MLflow opens its pages for traces of agents, with neither the list of runs nor the registry.
        """
        path = f"/artifacts/{artifact}" if artifact else ""
        return f"{self.uri}/#/experiments/{run.experiment}/runs/{run.id}{path}?workflowType=machine_learning"

    def experiment_of(self, run: str) -> str:
        """Return the id of a run's experiment."""
        return str(self._ask(lambda: self._client.get_run(run)).info.experiment_id)

    def _ask(self, request: Any) -> Any:
        try:
            return request()
        except MlflowException as error:
            text = str(error)
            if "Max retries exceeded" in text or "Connection" in text or "timed out" in text:
                raise TrackingError(
                    f"MLflow at {self.uri}: no answer; start it (`varflow up`) or set VARFLOW_MLFLOW_TRACKING_URI"
                ) from error
            raise TrackingError(f"MLflow at {self.uri}: {text[:400]}") from error
