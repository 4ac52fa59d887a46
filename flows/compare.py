"""Models side by side: champion against challenger, or any others, on what was measured of them alike."""

import json
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.config import CompareConfig
from infra.settings import read_settings
from infra.store import open_store
from infra.tracking import Run, Tracking
from tasks.compare import plan_comparison
from tasks.execute import Execution
from tasks.report import list_steps
from tasks.step import Planned


@flow(name="compare", persist_result=False)
def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare models by their records; all that is computed is what both say of the tokens of a few answers. The page is an artifact
    of the step's MLflow run."""
    settings = read_settings()
    store, tracking = open_store(settings), Tracking(settings.mlflow_tracking_uri)
    planned = plan_comparison(
        config.models, model=config.model_name or None, tokens=config.tokens,
        store=store, settings=settings, tracking=tracking,
    )  # fmt: skip
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        run.steps(*(given for given in planned.inputs.values() if isinstance(given, Planned)))
        ref = run.step(planned)
        folder, record = run.folder(ref), ref.record
        shown = run.tracking.run_url(
            Run(record.mlflow_run, tracking.experiment_of(record.mlflow_run), ""), artifact="comparison.html"
        )
        run.tracking.log(run.parent.id, tags={"report": shown})
        text = f"# {' against '.join(config.models)}\n\n[The page]({shown}) · [MLflow run]({run.links['mlflow_run']})"
        create_markdown_artifact(text, key="comparison", description=" against ".join(config.models))
        comparison = json.loads((folder / "comparison.json").read_text())
        links = run.links | {"report": str(folder / "comparison.html"), "report_in_mlflow": shown}
        return {"comparison": comparison, "steps": list_steps(run)} | links
