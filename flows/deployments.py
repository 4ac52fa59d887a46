"""What the worker can be asked to run, in one table: flow, parameters, schedules, triggers."""

import logging
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from evaluation.judges.config import EndpointJudge, JudgeConfig
from evaluation.suites import demo as demo_suite
from flows import recipes
from flows.align import align
from flows.benchmark import benchmark
from flows.compare import compare
from flows.config import BenchmarkFlowConfig, CompareConfig, JudgeFlowConfig, RetrainConfig
from flows.judge import judge
from flows.retrain import retrain, sweep
from infra.settings import Settings

DEBOUNCE = timedelta(seconds=20)
SWEEP_EVERY = timedelta(minutes=15)

JUDGING = JudgeConfig(benchmark="evalbiasbench", judge=EndpointJudge(model="gpt-4-1106-preview", revision="2023-11-06"))

LOG = logging.getLogger("varflow.deployments")


@dataclass(frozen=True)
class Entry:
    """One deployment. `schedules` are switched by the user in the Prefect UI and never reset by us."""

    flow: Flow[Any, Any]
    description: str
    parameters: dict[str, Any]
    schedules: tuple[DeploymentScheduleCreate, ...] = ()
    triggers: tuple[DeploymentEventTrigger, ...] = field(default_factory=tuple)
    purpose: str = ""  # the deployment's own name where a flow has several; else the flow's

    @property
    def deployment(self) -> str:
        return self.purpose or self.flow.name

    @property
    def name(self) -> str:
        return f"{self.flow.name}/{self.deployment}"


def table() -> tuple[Entry, ...]:
    """Return every deployment."""
    demo = recipes.demo()
    retraining = RetrainConfig(recipe=demo.model_copy(update={"name": "retrain", "champion": "current"}))
    reevaluation = BenchmarkFlowConfig(
        name="nightly", model=f"champion:{demo.model_name}", benchmarks=demo.benchmarks, suite=demo.suite
    )
    landed = DeploymentEventTrigger(
        name="preferences landed",
        description="Starts a retrain for pushed batches; what lands within the debounce goes into the same run.",
        expect={"preferences.landed"},
        match={"prefect.resource.id": "prefs.*"},
        threshold=1,
        within=DEBOUNCE,
        schedule_after=DEBOUNCE,
    )
    return (
        Entry(
            align,
            "Preference data in, a verdict out. The form is the whole configuration; the defaults are the demo's.",
            {"config": demo.model_dump(mode="json")},
            (DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone="UTC"), active=False),),
        ),
        Entry(
            retrain,
            "Train on every batch that was pushed, when there is news and no other run is on it. What starts by itself should plan how often "
            "a year its gate is asked: recipe.gate.planned_looks.",
            {"config": retraining.model_dump(mode="json")},
            (DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *", timezone="UTC"), active=False),),
            (landed,),
        ),
        Entry(
            sweep,
            "Start a retrain for batches that no event told of.",
            {},
            (DeploymentScheduleCreate(schedule=IntervalSchedule(interval=SWEEP_EVERY), active=True),),
        ),
        Entry(
            benchmark,
            "Any suite on any model.",
            {"config": BenchmarkFlowConfig(model=demo.policy, suite=demo_suite()).model_dump(mode="json")},
        ),
        Entry(
            benchmark,
            "The champion on its suite again: nothing is computed unless harness, data, settings or champion changed.",
            {"config": reevaluation.model_dump(mode="json")},
            (DeploymentScheduleCreate(schedule=CronSchedule(cron="0 4 * * *", timezone="UTC"), active=False),),
            purpose="nightly",
        ),
        Entry(
            judge,
            "A judge on pairs of answers: Arena-Hard, held-out answers, or sets that test the judge itself.",
            {"config": JudgeFlowConfig(judging=JUDGING, files="/path/to/benchmarks").model_dump(mode="json")},
        ),
        Entry(
            compare,
            "Models side by side, by what is on record; the first one is the reference.",
            {"config": CompareConfig(models=(f"champion:{demo.model_name}", demo.policy)).model_dump(mode="json")},
        ),
    )


def find_flow(name: str) -> Flow[Any, Any]:
    """Return the flow of a deployment."""
    return next(entry.flow for entry in table() if entry.flow.name == name)


def register(settings: Settings) -> list[str]:
    """Create the deployments that are absent and return their names.

    Of those that exist only what the code owns is renewed (entrypoint, form, description); schedules, parameters and
    triggers belong to the user from the first day on. Parameters that the form no longer takes become the defaults, with a warning.
    """
    created = []
    with get_client(sync_client=True) as client:
        for entry in table():
            deployment = entry.flow.to_deployment(
                name=entry.deployment,
                description=entry.description,
                parameters=entry.parameters,
                schedules=list(entry.schedules),
                triggers=list(entry.triggers),
                work_pool_name=settings.work_pool,
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
            assert isinstance(deployment, RunnerDeployment)
            if not renew(client, entry.name, deployment):
                deployment.apply()
                created.append(entry.name)
    return created


def renew(client: SyncPrefectClient, name: str, deployment: RunnerDeployment) -> bool:
    """Update an existing deployment in what the code owns; False where there is none."""
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    owned: dict[str, Any] = {
        "description": deployment.description,
        "entrypoint": deployment.entrypoint,
        "parameter_openapi_schema": deployment._parameter_openapi_schema.model_dump(exclude_unset=True),
    }
    try:
        client.update_deployment(found.id, DeploymentUpdate(**owned))
    except PrefectHTTPStatusError as refusal:
        if refusal.response.status_code != HTTPStatus.CONFLICT:
            raise
        # Parameters of an older version, which its form took and this one's does not: no run of them could start.
        LOG.warning("deployment %s: its parameters do not fit this version and are its defaults again", name)
        client.update_deployment(found.id, DeploymentUpdate(**owned, parameters=deployment.parameters))
    return True
