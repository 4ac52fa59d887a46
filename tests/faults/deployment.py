"""A deployment of the stack, started by hand and looked at from outside."""

import subprocess
import sys
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun

from infra.settings import Settings
from tests.faults.command import Command, prefect_at

RUN = "from prefect.deployments import run_deployment; run_deployment('%s', timeout=0, as_subflow=False)"


class Deployment:
    """A deployment as its server knows it."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings, self.name = settings, name
        with prefect_at(settings), get_client(sync_client=True) as client:
            self.id: UUID = client.read_deployment_by_name(name).id

    def set_parameters(self, parameters: dict[str, Any]) -> None:
        """Change what its runs are started with."""
        with prefect_at(self._settings), get_client(sync_client=True) as client:
            client.update_deployment(self.id, DeploymentUpdate(parameters=parameters))

    def runs(self) -> list[FlowRun]:
        """Return its runs."""
        chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.id]))
        with prefect_at(self._settings), get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=chosen)

    def ended(self) -> list[FlowRun]:
        """Return its runs that are over, [] while one is not."""
        runs = [run for run in self.runs() if run.state and run.state.type != "SCHEDULED"]
        return runs if all(run.state and run.state.is_final() for run in runs) else []

    def said(self, run: FlowRun) -> str:
        """Return what a run logged."""
        with prefect_at(self._settings), get_client(sync_client=True) as client:
            return "\n".join(
                log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
            )


def run_python(varflow: Command, text: str) -> None:
    """Run a line of Python with the stack's settings in a process of its own."""
    call = ["-c", f"from infra.settings import read_settings; read_settings().apply(); {text}"]
    subprocess.run([sys.executable, *call], env=varflow.environment({}), check=True, capture_output=True)
