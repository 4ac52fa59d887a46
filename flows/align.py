"""Preference data in, a verdict out: the story of varflow, once from beginning to end."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from evaluation.config import GateConfig, SuiteConfig
from evaluation.gate.policy import flag_policy
from evaluation.harness.mirror import FILL, missing_data
from evaluation.judges.config import JudgeConfig
from evaluation.suites import fix_batch_size
from flows.alignment import BASELINE, MODEL, AlignmentPlan, plan_alignment
from flows.approval import ask_approval, describe_refusal
from flows.config import AlignConfig, TrainedReward
from flows.judge import take_judge
from infra.registry import find_refusal, read_history, read_standing
from infra.settings import Settings, read_settings
from infra.store import Store, open_store
from tasks.candidate import read_sealed
from tasks.evaluate import MirrorConfig, evaluate, mirror
from tasks.execute import Execution
from tasks.gate import CHALLENGER, CHAMPION, NOISE, gate, take_look
from tasks.generate import generate
from tasks.ingest import ingest
from tasks.judge import judge
from tasks.noise import plan_noise
from tasks.promote import promote
from tasks.report import ReportConfig, publish, report, report_url
from tasks.reward_model import reward_model
from tasks.score import score_cross, score_reference, score_rewards
from tasks.sources import resolve_source
from tasks.step import ArtifactRef, Given, Planned, Source, Step
from tasks.train import train
from training.config import Config, CrossScoreConfig, StoredColumn

Plan = Callable[..., Planned]  # of a step, its config and inputs, with the config's runtime


@dataclass(frozen=True)
class AlignPlan:
    """Every step of one alignment, known before anything runs."""

    rows: Planned
    scorer: Given
    columns: dict[str, Given]  # rewards and reference log-probabilities of the stored responses
    challenger: Planned
    champion: Given
    mirror: Planned
    answers: dict[str, Given]  # of both models to the held-out prompts
    varied: list[Planned]  # benchmarks of the champion under what should not matter
    judged: dict[str, Given]  # held-out rewards, benchmarks of both models and the noise floor, as the gate names them
    alignment: AlignmentPlan  # decides nothing
    gate: Planned
    judge: Planned | None  # of both models' held-out answers
    report: Planned

    def steps(self) -> Iterator[Planned]:
        """Yield the steps in the order in which they run."""
        story = (
            self.mirror, *self.alignment.sets, self.rows, self.scorer, *self.columns.values(), self.challenger,
            *self.answers.values(), *self.varied, *self.judged.values(), *self.alignment.scored, *self.alignment.results, self.gate,
            self.judge, self.report,
        )  # fmt: skip
        yield from (step for step in story if isinstance(step, Planned))

    def at_look(self, gate: Planned) -> "AlignPlan":
        """Return the plan with the gate as one look of a year, which is known only when it is taken: others may be taken before."""
        return replace(self, gate=gate, report=replace(self.report, inputs={**self.report.inputs, "gate": gate}))


def plan_align(config: AlignConfig, *, store: Store, settings: Settings) -> AlignPlan:
    """Resolve the sources by content and lay out every step. Reads, but computes and writes nothing in the store."""
    source = partial(resolve_source, store=store, settings=settings)
    policy = source(config.policy)
    champion = _find_champion(config, policy, store=store, settings=settings)

    def plan(step: Step, step_config: Config, inputs: Mapping[str, Given], *, label: str = "") -> Planned:
        return step(step_config, inputs, runtime=config.runtime, label=label)

    rows, scorer, columns = plan_preferences(config, policy=policy, source=source, plan=plan)
    data: dict[str, Given] = {"rows": rows, "base": policy}
    challenger = plan(train, config.train, data | columns)
    raw = source(config.benchmarks)
    files = plan(mirror, MirrorConfig(), {"raw": raw})

    models: dict[str, Given] = {CHAMPION: champion, CHALLENGER: challenger}
    answers, judged, varied = plan_evidence(config, models, rows=rows, scorer=scorer, files=files, plan=plan)
    aligned = plan_alignment(
        config.suite.alignment, models={MODEL: (CHALLENGER, challenger), BASELINE: (CHAMPION, champion)}, scorer=scorer,
        scoring=config.reward.scoring, files=raw, runtime=config.runtime, store=store, settings=settings,
    )  # fmt: skip
    answered = {f"{who}_answers": step for who, step in answers.items()}
    verdict = plan(gate, GateConfig(policy=config.gate), models | answered | judged | {"rows": rows})
    shown = answered | columns | judged
    shown |= {"rows": rows, "scorer": scorer, "challenger": challenger, "gate": verdict}
    shown |= {f"{step.step.name}_{step.label}": step for step in aligned.results}
    heldout = plan_heldout_judge(config, answered, store=store, settings=settings)
    shown |= {"judge": heldout} if heldout else {}
    page = plan(report, ReportConfig(recipe=config.name), shown)
    return AlignPlan(
        rows, scorer, columns, challenger, champion, files, answers, varied, judged, aligned, verdict, heldout, page
    )


def plan_preferences(
    config: AlignConfig, *, policy: Source, source: Callable[[str], Source], plan: Plan
) -> tuple[Planned, Given, dict[str, Given]]:
    """Return the rows, what scores their responses, and the columns of scores that the objective reads."""
    rows = plan(ingest, config.ingest, {"source": source(config.preferences)})
    scorer: Given
    if isinstance(config.reward, TrainedReward):
        scorer = plan(reward_model, config.reward.training, {"rows": rows, "base": source(config.reward.base)})
    else:
        scorer = source(config.reward.model)
    score = config.reward.scoring
    columns: dict[str, Given] = {}
    if StoredColumn.rewards in config.train.columns:
        columns["rewards"] = plan(score_rewards, score, {"rows": rows, "scorer": scorer}, label="preferences")
    if StoredColumn.reference in config.train.columns:
        columns["reference"] = plan(score_reference, config.reference, {"rows": rows, "reference": policy})
    if StoredColumn.cross in config.train.columns:
        scored: dict[str, Given] = {"rows": rows, "base": policy, "scorer": scorer}
        columns["cross"] = plan(score_cross, cross_config(config), scored | columns)
    return rows, scorer, columns


def plan_evidence(
    config: AlignConfig, models: Mapping[str, Given], *, rows: Planned, scorer: Given, files: Planned, plan: Plan
) -> tuple[dict[str, Given], dict[str, Given], list[Planned]]:
    """Return the models' answers, what the gate weighs by the names that it reads, and the varied runs behind the noise floor."""
    answers: dict[str, Given] = {}
    judged: dict[str, Given] = {}
    for who, model in models.items():
        answers[who] = plan(generate, config.heldout, {"rows": rows, "policy": model}, label=who)
        judged[f"{who}_rewards"] = plan(
            score_rewards, config.reward.scoring, {"rows": answers[who], "scorer": scorer}, label=who
        )
        for benchmark in config.suite.benchmarks:
            benchmark = fix_batch_size(benchmark, microbatch_tokens=config.runtime.microbatch_tokens)
            inputs = {"model": model, "mirror": files}
            judged[f"{who}_eval_{benchmark.name}"] = plan(evaluate, benchmark, inputs, label=f"{benchmark.name} {who}")
    evaluated = {b.name: judged[f"{CHAMPION}_eval_{b.name}"] for b in config.suite.benchmarks}
    floor = plan_noise(
        config.noise, config.suite, model=models[CHAMPION], files=files, measured=evaluated, runtime=config.runtime
    )
    varied = floor[0] if floor else []
    if floor:
        judged[NOISE] = floor[1]
    return answers, judged, varied


def plan_heldout_judge(
    config: AlignConfig, answers: Mapping[str, Given], *, store: Store, settings: Settings
) -> Planned | None:
    """Return the step in which a judge compares both models' held-out answers, None where nobody is asked."""
    if config.judge is None:
        return None
    asked = take_judge(config.judge.judge, config.judge.model, store=store, settings=settings)
    judging = JudgeConfig(benchmark="heldout", judge=config.judge.judge)
    return judge(judging, {**answers, **asked}, runtime=config.judge.runtime, label=judging.name)


def cross_config(config: AlignConfig) -> CrossScoreConfig:
    """Return how the batches of this alignment's training are scored: as its stored responses are."""
    train = config.train
    return CrossScoreConfig(
        batch_prompts=train.batch_prompts,
        epochs=train.epochs,
        max_tokens=train.max_tokens,
        seed=train.seed,
        reward=config.reward.scoring,
        precision=config.reference.precision,
    )


def _find_champion(config: AlignConfig, policy: Source, *, store: Store, settings: Settings) -> Given:
    """Return the model to beat."""
    held = read_standing(store, config.model_name).champion if config.champion == "current" else None
    if held:
        return resolve_source(held.ref, store=store, settings=settings)
    if config.champion in {"base", "current"}:
        return replace(policy, name="base")
    return resolve_source(config.champion, store=store, settings=settings)


@flow(name="align", persist_result=False, validate_parameters=True)
def align(config: AlignConfig) -> dict[str, Any]:
    """Align a policy with preferences, measure it against the champion, promote it if the gate says so.

    Returns the verdict, every step with its fingerprint, and links. A rerun goes on where the last one ended.
    """
    settings = read_settings()
    for flag in flag_policy(config.gate, config.suite):
        get_run_logger().warning("gate: %s", flag)
    plan = plan_align(config, store=open_store(settings), settings=settings)
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        files = run.step(plan.mirror)
        check_benchmarks(config.suite, source=config.benchmarks, folder=run.folder(files))
        run.steps(*plan.alignment.sets)
        run.step(plan.rows)
        run.steps(plan.scorer, *plan.columns.values())
        challenger = run.step(plan.challenger)
        run.steps(*plan.answers.values(), *plan.varied, *plan.judged.values(), *plan.alignment.steps())
        plan = plan.at_look(take_look(plan.gate, store=run.store, model=config.model_name))
        verdict = run.step(plan.gate)
        run.steps(*filter(None, [plan.judge]))
        page = run.step(plan.report)
        refused = ask_person(config, run, page=page, verdict=verdict)
        promoted = promote(run, model=config.model_name, challenger=challenger, verdict=verdict, refused=refused)
        return publish(run, page, verdict=verdict, promoted=promoted)


def ask_person(config: AlignConfig, run: Execution, *, page: ArtifactRef, verdict: ArtifactRef) -> str:
    """Ask for approval where the config wants it and the gate says PROMOTE; return '' for a yes, else what is kept of the no.

    A verdict that was refused before is not asked about again: it promotes nothing, as the promotion will say.
    """
    summary = verdict.record.summary
    if not config.approval or summary["verdict"] != "PROMOTE":
        return ""
    if find_refusal(read_history(run.store, config.model_name), verdict=verdict.name):
        return ""
    sealed = read_sealed(run.store, verdict.record)
    approval = ask_approval(
        model=config.model_name,
        reasons=sealed.reasons,
        flags=sealed.flags,
        report=report_url(run, page),
        page=run.prefect_url,
    )
    return "" if approval.promote else describe_refusal(approval)


def check_benchmarks(suite: SuiteConfig, *, source: str, folder: Path) -> None:
    """Refuse, naming all that is missing, a suite whose files are not all there, before an hour of work is spent."""
    missing = missing_data(folder, suite.benchmarks)
    if missing:
        lines = "\n  ".join(missing)
        raise ValueError(
            f"benchmarks {source!r}: {len(missing)} files or tasks of the suite are not there:\n  {lines}\n"
            f"{FILL}, or take the benchmarks out of the suite"
        )
