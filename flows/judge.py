"""A judge on pairs of answers: a model on Arena-Hard, two models' held-out answers, or the judge itself on sets that test it."""

from collections.abc import Mapping
from typing import Any

from prefect import flow

from evaluation.config import EvalSetConfig, PromptSetConfig
from evaluation.eval_sets import FOLDERS, check_limit
from evaluation.gate.verdict import Noise
from evaluation.judges.config import AnyJudge, EndpointJudge, JudgeConfig
from flows.config import JudgeFlowConfig
from infra import records
from infra.settings import Settings, read_settings
from infra.store import Store, open_store
from tasks.alignment import prompt_set
from tasks.execute import Execution
from tasks.generate import generate
from tasks.judge import NOISE
from tasks.judge import judge as judge_step
from tasks.report import list_steps
from tasks.sources import resolve_source
from tasks.step import Given, Planned
from training.config import Runtime


def take_judge(judge: AnyJudge, model: str, *, store: Store, settings: Settings) -> dict[str, Given]:
    """Return the input that a local judge is; an endpoint is none, but has to have an address, which is said before any work."""
    if isinstance(judge, EndpointJudge):
        settings.require_judge_url()
        return {}
    return {"judge": resolve_source(model, store=store, settings=settings)}


def plan_judge(config: JudgeFlowConfig, *, store: Store, settings: Settings) -> list[Planned]:
    """Return the steps in their order, the judge's last."""

    def source(reference: str) -> Given:
        return resolve_source(reference, store=store, settings=settings)

    judging, runtime = config.judging, config.runtime
    steps: list[Planned] = []
    inputs = take_judge(judging.judge, config.judge_model, store=store, settings=settings)
    if judging.benchmark == "heldout":
        inputs |= {"challenger_answers": source(config.model), "champion_answers": source(config.against)}
        judging = judging.model_copy(update={"prompts": name_prompts(inputs["challenger_answers"], store=store)})
    else:
        inputs["benchmark"] = source(f"{config.files}/{FOLDERS[judging.benchmark]}")
    if judging.benchmark == "arena_hard":
        plain = Runtime.model_validate(runtime.model_dump(include=set(Runtime.model_fields)))
        asked = PromptSetConfig(name="arena_hard")
        rows = prompt_set(asked, {"raw": inputs["benchmark"]}, runtime=plain, label=asked.title)
        answers = config.answers.model_copy(update={"limit": judging.limit})
        policy = {"rows": rows, "policy": source(config.model)}
        steps = [rows, generate(answers, policy, runtime=plain, label=judging.name)]
        inputs["answers"] = steps[-1]
    return [*steps, judge_step(judging, inputs, runtime=runtime, label=judging.name)]


def name_prompts(answers: Given, *, store: Store) -> str:
    """Return what was answered: the prompt set's name, or heldout."""
    generated = records.read_record(store, step="generate", fingerprint=answers.fingerprint)
    asked = generated and records.read_record(store, step="prompt_set", fingerprint=generated[0].inputs["rows"])
    return EvalSetConfig.model_validate(asked[0].identity["config"]).title if asked else "heldout"


def read_draws(summary: Mapping[str, Any], judging: JudgeConfig) -> dict[str, Any]:
    """Return the noise floor of a judge that was asked several times."""
    figures = {name: summary[name] for name in NOISE}
    return Noise(varied="the judge's draw", runs=judging.repeats, **figures).model_dump(mode="json")


@flow(name="judge", persist_result=False, validate_parameters=True)
def judge(config: JudgeFlowConfig) -> dict[str, Any]:
    """Have a judge compare answers, each pair in both orders. A call that was answered is never made again."""
    settings = read_settings()
    steps = plan_judge(config, store=open_store(settings), settings=settings)
    with Execution(settings, experiment=config.name, config=config.model_dump(mode="json")) as run:
        if config.judging.benchmark == "arena_hard" and config.judging.limit is not None:
            asked = run.step(steps[0]).record.summary["rows"]  # before a policy answers them all
            check_limit(config.judging.limit, asked, what="arena_hard: questions")
        run.steps(*steps)
        summary = dict(run.ref(steps[-1]).record.summary)
        scores = {figure: value for figure, value in summary.pop("metrics").items() if figure.startswith("eval/")}
        judging = steps[-1].config
        assert isinstance(judging, JudgeConfig), f"the last step is {steps[-1]}"
        name = judging.name
        return {
            "scores": scores,
            "flags": {name: summary["flag"]} if summary["flag"] else {},
            "benchmarks": {name: summary},
            "noise": {name: [read_draws(summary, config.judging)]} if config.judging.repeats > 1 else {},
            "steps": list_steps(run),
        } | run.links
