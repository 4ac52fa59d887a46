"""What a recipe's training checks at its start, without the training: every step before it, then the checks."""

from typing import Any

from prefect import flow

import tasks.preflight
from flows.align import plan_align
from flows.config import AlignConfig
from infra.settings import read_settings
from infra.store import open_store
from tasks.execute import Execution
from tasks.report import list_steps


@flow(name="preflight", persist_result=False, validate_parameters=True)
def preflight(config: AlignConfig) -> dict[str, Any]:
    """Bring rows and scores to their artifacts and check what would be trained on them. Failed checks are an outcome, not an error."""
    settings = read_settings()
    plan = plan_align(config, store=open_store(settings), settings=settings)
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        run.step(plan.rows)
        run.steps(plan.scorer, *plan.columns.values())
        return tasks.preflight.preflight(run, plan.challenger) | {"steps": list_steps(run)} | run.links
