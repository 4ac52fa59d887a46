"""The page a run ends with, and its short form for the terminal and for Prefect."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyarrow.parquet as pq
from prefect.artifacts import create_markdown_artifact

from infra import provenance
from infra.tracking import Run
from tasks.contamination import read_contamination
from tasks.cost import list_prices, show_total, total_costs
from tasks.execute import Execution, StepAttempt
from tasks.gate import CHALLENGER, CHAMPION, read_rewards
from tasks.step import ArtifactRef, Attempt, Metrics, Planned, step
from training.config import Config
from training.job import ANSWERS_FILE, METRICS_FILE, read_json_lines
from training.preflight.findings import FILE as PREFLIGHT_FILE

if TYPE_CHECKING:
    from evaluation.harness.result import ScoreRow
    from evaluation.pages.report import RewardPair, SampleAnswer, StepRow, TrainingAnswer

SAMPLES_SHOWN = 8
AnyResult = TypeVar("AnyResult", bound=Config)


class ReportConfig(Config):
    """Which run the page is about."""

    recipe: str


@step(version=9)
def report(config: ReportConfig, attempt: Attempt) -> Metrics:
    """Write the page: verdict, evidence, data, cost, lineage. Inputs: what the gate weighed and what it came from."""
    from evaluation.alignment import AlignmentResult
    from evaluation.answers import read_prompt_ids
    from evaluation.gate.verdict import read_verdict
    from evaluation.pages.report import ReportData, render_report  # Plotly: only where a page is written
    from evaluation.reward_bias import RewardBias

    attempt = cast(StepAttempt, attempt)  # the page tells of the run it is made in: its steps, costs and links
    inputs, execution = attempt.inputs, attempt.execution
    verdict = read_verdict((inputs["gate"] / "verdict.json").read_bytes())
    rewards = {who: read_rewards(inputs[f"{who}_rewards"]) for who in (CHAMPION, CHALLENGER)}
    trained, spent = inputs["challenger"], [execution.ref(planned).record for planned in execution.done]
    page = render_report(
        ReportData(
            title=f"{config.recipe}: {verdict.decision}",
            recipe=config.recipe,
            verdict=verdict,
            contamination=read_contamination(inputs["gate"]),
            champion_scores=read_scores(inputs, CHAMPION),
            challenger_scores=read_scores(inputs, CHALLENGER),
            rewards=pair_rewards(rewards, prompts=read_prompt_ids(inputs[f"{CHALLENGER}_answers"])),
            samples=read_samples(inputs, rewards),
            metrics=existing(trained / METRICS_FILE),
            weights=existing(trained / "weights.parquet"),
            training=read_json(trained / "summary.json"),
            answers=read_answers(trained / ANSWERS_FILE),
            preflight=read_json(trained / PREFLIGHT_FILE),
            data=read_json(inputs["rows"] / "summary.json"),
            reward_model=read_json(inputs["scorer"] / "summary.json"),
            judge=read_json(inputs["judge"] / "summary.json") if "judge" in inputs else None,
            alignment=read_results(inputs, "alignment", AlignmentResult),
            reward_tests=read_results(inputs, "reward_bias", RewardBias),
            steps=tuple(describe_step(planned, execution) for planned in execution.done),
            cost=show_total(total_costs(done.cost for done in spent), prices=list_prices(spent)),
            links={
                "Prefect run": execution.links["prefect_run"],
                "MLflow run": execution.links["mlflow_run"],
                "S3": execution.store.url("mlflow/" + execution.experiment_name),
            },
            config=execution.config,
            provenance=provenance.describe(),
        )
    )
    (attempt.output / "report.html").write_text(page)
    return {}


def describe_step(planned: Planned, execution: Execution) -> "StepRow":
    """Return a step as the page lists it: identity, cost, and where to look."""
    from evaluation.pages.report import StepRow

    ref = execution.ref(planned)
    record = ref.record
    run = Run(record.mlflow_run, execution.experiment, "")
    return StepRow(
        step=record.step,
        label=planned.label,
        fingerprint=record.fingerprint,
        cached=ref.cached,
        seconds=record.cost["wall_seconds"],
        device=record.provenance.get("device", ""),
        usd=record.cost.get("usd"),
        inputs=record.inputs,
        mlflow_url=execution.tracking.run_url(run),
        prefix=execution.store.url(record.prefix),
    )


def read_scores(inputs: Any, who: str) -> "tuple[ScoreRow, ...]":
    """Return all score rows of one model."""
    from evaluation.harness.result import ScoreRow

    folders = [inputs[name] for name in sorted(inputs) if name.startswith(f"{who}_eval_")]
    return tuple(
        ScoreRow.model_validate(row) for folder in folders for row in json.loads((folder / "scores.json").read_text())
    )


def read_results(inputs: Mapping[str, Path], step: str, kind: type[AnyResult]) -> tuple[AnyResult, ...]:
    """Return the figures of every set that a kind of step measured; none where the recipe asks for none."""
    folders = [folder for name, folder in inputs.items() if name.startswith(f"{step}_")]
    return tuple(kind.model_validate_json((folder / f"{step}.json").read_text()) for folder in folders)


def pair_rewards(rewards: Mapping[str, Mapping[str, float]], *, prompts: Mapping[str, str]) -> "tuple[RewardPair, ...]":
    """Return both models' mean rewards of each prompt, as the gate tests them."""
    from evaluation.pages.report import RewardPair
    from evaluation.statistics import average_clusters

    rows = sorted(rewards[CHAMPION])
    names = [prompts[row] for row in rows]
    champion, challenger = (
        average_clusters([rewards[who][row] for row in rows], names).tolist() for who in (CHAMPION, CHALLENGER)
    )
    return tuple(RewardPair(champion=old, challenger=new) for old, new in zip(champion, challenger, strict=True))


def read_samples(inputs: Any, rewards: dict[str, dict[str, float]]) -> "tuple[SampleAnswer, ...]":
    """Return held-out prompts with both answers: those whose reward moved most, up and down by turns."""
    from evaluation.pages.report import SampleAnswer

    answers = {
        who: {
            row["row_id"]: row
            for row in pq.read_table(
                inputs[f"{who}_answers"] / "responses.parquet", columns=["row_id", "prompt", "responses"]
            ).to_pylist()
        }
        for who in (CHAMPION, CHALLENGER)
    }
    rows = sorted(rewards[CHAMPION], key=lambda row: rewards[CHALLENGER][row] - rewards[CHAMPION][row])
    half = SAMPLES_SHOWN // 2
    chosen = rows if len(rows) <= SAMPLES_SHOWN else [*reversed(rows[-half:]), *rows[:half]]
    return tuple(
        SampleAnswer(
            prompt="\n\n".join(f"{turn['role']}: {turn['content']}" for turn in answers[CHAMPION][row]["prompt"]),
            champion=answers[CHAMPION][row]["responses"][0],
            challenger=answers[CHALLENGER][row]["responses"][0],
            champion_reward=rewards[CHAMPION][row],
            challenger_reward=rewards[CHALLENGER][row],
        )
        for row in chosen
    )


def read_answers(path: Path) -> "tuple[TrainingAnswer, ...]":
    """Return what the policy answered while it trained; nothing where it was not asked."""
    from evaluation.pages.report import TrainingAnswer

    lines = read_json_lines(path) if path.exists() else []
    return tuple(TrainingAnswer(**{name: line[name] for name in ("step", "prompt", "answer")}) for line in lines)


def existing(path: Path) -> Path | None:
    """Return a path when there is something."""
    return path if path.exists() else None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, None where there is no file."""
    return json.loads(path.read_text()) if path.exists() else None


def report_url(run: Execution, page: ArtifactRef) -> str:
    """Return where MLflow shows the page."""
    return run.tracking.run_url(Run(page.record.mlflow_run, run.experiment, ""), artifact="report.html")


def publish(run: Execution, page: ArtifactRef, *, verdict: ArtifactRef, promoted: str) -> dict[str, Any]:
    """Show a run's outcome on its Prefect and MLflow pages, and return it as plain data."""
    decision = str(verdict.record.summary["verdict"])
    reasons = [str(reason) for reason in verdict.record.summary["reasons"]]
    local = run.folder(page) / "report.html"
    shown = report_url(run, page)
    links = run.links | {"report": str(local), "report_in_mlflow": shown}
    text = write_outline(run, decision=decision, reasons=reasons, promoted=promoted, links=links)
    run.tracking.log(run.parent.id, tags={"verdict": decision, "report": shown, "mlflow.note.content": text})
    create_markdown_artifact(text, key="verdict", description=f"{run.experiment_name}: {decision}")
    return {
        "verdict": decision,
        "reasons": reasons,
        "flags": verdict.record.summary["flags"],
        "promotion": promoted,
        "steps": list_steps(run),
    } | links


def write_outline(run: Execution, *, decision: str, reasons: list[str], promoted: str, links: dict[str, str]) -> str:
    """Return the outcome in Markdown: verdict, reasons, links, and every step with the run that computed it."""
    steps = []
    for planned in run.done:
        row = describe_step(planned, run)
        state = "cached" if row.cached else "computed"
        steps.append(
            f"| [{planned.title}]({row.mlflow_url}) | {state} | {row.seconds:.1f} | `{row.fingerprint[:12]}` |"
        )
    pages = (("Report", "report_in_mlflow"), ("MLflow run", "mlflow_run"), ("Prefect run", "prefect_run"))
    return "\n".join([
        f"# {decision}", "", *(f"- {reason}" for reason in reasons), "", promoted, "",
        " · ".join(f"[{title}]({links[name]})" for title, name in pages), "",
        "| step | state | seconds to compute | fingerprint |", "|---|---|---|---|", *steps,
    ])  # fmt: skip


def list_steps(run: Execution) -> list[dict[str, Any]]:
    """Return what a run did, step by step, as plain data."""
    return [
        {
            "step": planned.step.name,
            "title": planned.title,
            "fingerprint": planned.fingerprint,
            "cached": run.ref(planned).cached,
            "seconds": round(run.ref(planned).seconds, 3),
        }
        for planned in run.done
    ]
