"""Evaluations by reward model as steps of a flow: prompts answered and scored, pairs scored, and the figures of both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from evaluation.config import AlignmentConfig
from evaluation.eval_sets import FOLDERS
from infra import records
from infra.settings import Settings
from infra.store import Store
from tasks.alignment import alignment, pair_set, prompt_set, reward_bias
from tasks.generate import generate
from tasks.score import score_rewards
from tasks.sources import resolve_part
from tasks.step import Given, Planned, Source, Step
from training.config import Config, RewardScoreConfig, Runtime

MODEL, BASELINE = "model", "baseline"


@dataclass(frozen=True)
class AlignmentPlan:
    """Every step, known before anything runs. The sets come first: what is missing or broken there is told at once."""

    sets: tuple[Planned, ...]
    scored: tuple[Planned, ...]  # answers and rewards, each answer before its reward
    results: tuple[Planned, ...]

    def steps(self) -> Iterator[Planned]:
        """Yield the steps in the order in which they run."""
        yield from (*self.sets, *self.scored, *self.results)


def plan_alignment(
    config: AlignmentConfig,
    *,
    models: Mapping[str, tuple[str, Given]],
    scorer: Given | None,
    scoring: RewardScoreConfig,
    files: Source,
    runtime: Runtime,
    store: Store,
    settings: Settings,
) -> AlignmentPlan:
    """Lay out the steps of all sets. `models` gives the name on the screen and the model of MODEL, and perhaps of BASELINE.

    Raises ValueError naming every folder that is not there, and a reward model that was trained under another rendering.
    """
    wanted = (*config.prompt_sets, *config.pair_sets)
    if not wanted:
        return AlignmentPlan((), (), ())
    assert scorer, "a config with sets names a reward model"
    check_folders([each.name for each in wanted], files=files)
    check_render(scorer, scoring, store=store)
    sets: list[Planned] = []
    scored: list[Planned] = []
    results: list[Planned] = []

    def plan(to: list[Planned], step: Step, step_config: Config, inputs: Mapping[str, Given], label: str) -> Planned:
        to.append(step(step_config, inputs, runtime=runtime, label=label))
        return to[-1]

    raw = partial(resolve_part, files, settings=settings)
    for prompts in config.prompt_sets:
        rows = plan(sets, prompt_set, prompts, {"raw": raw(FOLDERS[prompts.name])}, prompts.title)
        weighed: dict[str, Given] = {}
        for role, (who, model) in models.items():
            prefix = "" if role == MODEL else f"{role}_"
            given = {"rows": rows, "policy": model}
            answers = plan(scored, generate, config.answers, given, f"{prompts.title} {who}")
            weighed[f"{prefix}answers"] = answers
            given = {"rows": answers, "scorer": scorer}
            weighed[f"{prefix}rewards"] = plan(scored, score_rewards, scoring, given, f"{prompts.title} {who}")
        plan(results, alignment, prompts, weighed, prompts.title)
    for pairs in config.pair_sets:
        rows = plan(sets, pair_set, pairs, {"raw": raw(FOLDERS[pairs.name])}, pairs.title)
        label = f"{pairs.title} pairs"
        scores = plan(scored, score_rewards, scoring, {"rows": rows, "scorer": scorer}, label)
        plan(results, reward_bias, pairs, {"rows": rows, "scores": scores}, pairs.title)
    return AlignmentPlan(tuple(sets), tuple(scored), tuple(results))


def check_folders(names: list[str], *, files: Source) -> None:
    """Refuse, naming all that is missing, sets whose folders are not there."""
    missing = [f"{name}: {FOLDERS[name]}" for name in names if not (files.path / FOLDERS[name]).is_dir()]
    if missing:
        raise ValueError(
            f"benchmarks {files.name!r}: {len(missing)} of {len(names)} sets have no folder at {files.path}: {', '.join(missing)}; "
            "add them there, or take the sets out of the suite"
        )


def check_render(scorer: Given, scoring: RewardScoreConfig, *, store: Store) -> None:
    """Refuse a reward model of the store that was trained under another rendering of prompt and answer."""
    if not isinstance(scorer, Source) or not scorer.name.startswith("reward_model/"):
        return
    record = records.resolve(store, scorer.name)
    trained = record.identity["config"]["render"]
    if trained != scoring.render:
        raise ValueError(
            f"{scorer.name}: was trained with render {trained}, and is to be asked with {scoring.render}; a reward model means "
            f"nothing on inputs it was not trained on; set scoring.render to {trained}"
        )
