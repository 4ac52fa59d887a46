"""Comparison: what was measured of several models alike is found on record, and laid side by side by one step."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow.parquet as pq
from pydantic import Field

from evaluation.config import EvalSetConfig
from infra import records
from infra.fingerprint import diff_identities, fingerprint
from infra.records import Record
from infra.settings import Settings
from infra.store import Store
from infra.tracking import Tracking, read_steps
from tasks.artifacts import fetch_artifact
from tasks.candidate import find_model, name_run
from tasks.cost import total_costs
from tasks.execute import StepAttempt, flatten
from tasks.gate import read_rewards
from tasks.lineage import read_lineage
from tasks.score import score_tokens
from tasks.sources import resolve_source
from tasks.step import Attempt, Given, Metrics, Planned, Source, step
from training.config import Config, Runtime, TokenScoreConfig
from training.job import read_json_lines, write_json

if TYPE_CHECKING:
    from evaluation.comparison import Answer, Comparison, ItemText, Subject, TokenAnswers, Verdicts

ROWS_FILE = "rows.parquet"
MEASURE = re.compile("^(eval|judge|set)_")  # before the name of a benchmark, of what a judge compared, of a prompt set
STORED = re.compile(r"([a-z_]+/)?[0-9a-f]{6,64}")  # an artifact, or the start of its fingerprint


class SubjectConfig(Config):
    """One model of a comparison, and what its records say of it."""

    name: str
    ref: str
    settings: dict[str, Any] = Field({})
    data: dict[str, Any] = Field({})
    cost: dict[str, float] = Field({})


class ComparisonConfig(Config):
    """The models, the reference first."""

    subjects: tuple[SubjectConfig, ...]


@dataclass
class Measured:
    """A model and everything on record that was measured of it, newest last; of a run, only what that run measured."""

    name: str
    fingerprint: str
    record: Record | None = None  # None for a source, which nothing here made
    only: frozenset[str] | None = None  # references that count, where a run was named
    source: Source | None = None  # where its weights lie, if it came from outside
    # what is compared: eval_<benchmark>, answers, rewards, set_<prompt set> (its rewards), judge_<benchmark>
    chosen: dict[str, Record] = field(default_factory=dict)
    answered: dict[str, Record] = field(default_factory=dict)  # the answers behind the last two, by the same names

    @property
    def ref(self) -> str:
        return self.record.ref if self.record else f"source {self.fingerprint[:16]}"

    def counts(self, record: Record) -> bool:
        return self.only is None or record.ref in self.only


@step(version=5)
def compare(config: ComparisonConfig, attempt: Attempt) -> Metrics:
    """Lay models side by side. Inputs: of the model at place N `N_eval_<benchmark>`, `N_answers`, `N_rewards`, `N_set_<prompt set>`
    (its rewards), `N_judge_<benchmark>`, `N_rows`, and `N_tokens` of its answers and the first model's."""
    from evaluation.comparison import compare as lay_side_by_side  # SciPy and Plotly: only where something is compared
    from evaluation.pages.comparison_page import render_comparison

    subjects = tuple(
        read_subject(
            given,
            {name.partition("_")[2]: folder for name, folder in attempt.inputs.items() if name.startswith(f"{place}_")},
        )
        for place, given in enumerate(config.subjects)
    )
    comparison = lay_side_by_side(subjects)
    run = cast(StepAttempt, attempt).execution  # the page tells of the run it is made in
    links = {"Prefect run": run.links["prefect_run"], "MLflow run": run.links["mlflow_run"]}
    write_json(attempt.output / "comparison.json", comparison.model_dump(mode="json"))
    (attempt.output / "comparison.html").write_text(render_comparison(comparison, subjects, links=links))
    return describe_figures(comparison)


def describe_figures(comparison: "Comparison") -> Metrics:
    """Return the differences as metrics, by the place of the model that is held against the first."""
    metrics: Metrics = {}
    for measure in comparison.measures:
        for place, difference in enumerate(measure.differences, start=2):
            name = f"compare/{measure.what}/{place}_minus_1"
            metrics |= {name: difference.difference, f"{name}_low": difference.low, f"{name}_high": difference.high}
    return metrics


def read_subject(config: SubjectConfig, inputs: Mapping[str, Path]) -> "Subject":
    """Return one model with what was measured of it, read from the artifacts."""
    from evaluation.comparison import Subject
    from evaluation.harness.result import read_result

    folders, judged, sets = (
        {name.removeprefix(kind): folder for name, folder in inputs.items() if name.startswith(kind)}
        for kind in ("eval_", "judge_", "set_")
    )
    rows = inputs.get("rows")
    return Subject(
        name=config.name,
        ref=config.ref,
        results={name: read_result(folder) for name, folder in folders.items()},
        texts={name: read_texts(folder) for name, folder in folders.items()},
        answers=read_answers(inputs["answers"]) if "answers" in inputs else {},
        rewards=read_rewards(inputs["rewards"]) if "rewards" in inputs else {},
        sets={name: read_rewards(folder) for name, folder in sets.items()},
        verdicts={name: read_verdicts(folder) for name, folder in judged.items()},
        tokens=read_tokens(inputs["tokens"]) if "tokens" in inputs else {},
        settings=config.settings,
        data=config.data,
        rows=frozenset(pq.read_table(rows / ROWS_FILE, columns=["row_id"])["row_id"].to_pylist())
        if rows
        else frozenset(),
        cost=config.cost,
    )


def read_texts(folder: Path) -> "dict[tuple[str, str], ItemText]":
    """Return what each item of a benchmark asked and got."""
    from evaluation.comparison import ItemText

    items = read_json_lines(folder / "samples.jsonl")
    return {
        (str(item["task"]), str(item["doc_id"])): ItemText(item["prompt"], item["answer"], item["target"])
        for item in items
    }


def read_verdicts(folder: Path) -> "Verdicts":
    """Return what a judge said of a model's answers, by question."""
    from evaluation.comparison import Verdicts

    (row,) = (row for row in json.loads((folder / "scores.json").read_text()) if row["decides"])
    pairs = read_json_lines(folder / "samples.jsonl")
    return Verdicts(
        detail=f"{row['metric'].replace('_', ' ')} {row['task']}, {row['filter']}",
        profile=json.loads((folder / "profile.json").read_text()),
        margins={pair["doc_id"]: (*pair["ours_first"], *pair["theirs_first"]) for pair in pairs},
    )


def read_answers(folder: Path) -> "dict[str, Answer]":
    """Return the answers to each held-out prompt, by row id."""
    from evaluation.comparison import Answer

    columns = ["row_id", "prompt", "responses", "truncated"]
    return {
        row["row_id"]: Answer(
            prompt="\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"]),
            responses=tuple(row["responses"]),
            truncated=tuple(row["truncated"]),
        )
        for row in pq.read_table(folder / "responses.parquet", columns=columns).to_pylist()
    }


def read_tokens(folder: Path) -> "dict[str, TokenAnswers]":
    """Return what both models say of the tokens of both answers, by row id."""
    from evaluation.comparison import TokenAnswers

    told: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    for answer in json.loads((folder / "tokens.json").read_text()):
        tokens = [(token["text"], token["reference"], token["policy"]) for token in answer["tokens"]]
        told.setdefault(answer["row_id"], {})[answer["whose"]] = tokens
    return {row: TokenAnswers(own.get("reference"), own.get("policy")) for row, own in told.items()}


def plan_comparison(
    references: tuple[str, ...],
    *,
    model: str | None,
    tokens: bool,
    store: Store,
    settings: Settings,
    tracking: Tracking,
) -> Planned:
    """Return the step that compares models, with everything on record that was measured of all of them alike; with `tokens` it
    takes as inputs the steps that ask both models about single tokens of a few answers.

    Raises ValueError, naming the field, where the same benchmark was measured of them in different ways only.
    """
    if len(set(references)) < max(len(references), 2):
        raise ValueError(f"compare: got {', '.join(references)}, expected at least two models, each once")
    found = [find_measured(r, model=model, store=store, settings=settings, tracking=tracking) for r in references]
    choose_alike(found, store=store)
    inputs: dict[str, Given] = {}
    subjects = []
    for place, one in enumerate(found):
        lineage = read_lineage(store, one.record) if one.record else None
        rows = lineage.find("ingest") if lineage else None
        taken = one.chosen | ({"rows": rows} if rows else {})
        for name, record in sorted(taken.items()):
            folder = fetch_artifact(store, record, home=settings.home)
            ref = record.ref
            inputs[f"{place}_{name}"] = Source(ref, folder, record.fingerprint, content=records.digest_files(record))
        subjects.append(describe_subject(one, store=store))
    if tokens:
        inputs |= plan_tokens(found, inputs, store=store, settings=settings)
    return compare(ComparisonConfig(subjects=tuple(subjects)), inputs, runtime=Runtime())


def plan_tokens(
    found: list[Measured], inputs: Mapping[str, Given], *, store: Store, settings: Settings
) -> dict[str, Given]:
    """Return `N_tokens` of every later model whose answers, and whose weights and the first one's, are here to be had."""
    from evaluation.comparison import choose_rows

    if not all("answers" in one.chosen for one in found):
        return {}
    models = [
        one.source or (resolve_source(one.ref, store=store, settings=settings) if one.record else None) for one in found
    ]
    rewards = [inputs.get(f"{place}_rewards") for place in (0, len(found) - 1)]
    first, last = (read_rewards(given.path) if isinstance(given, Source) else {} for given in rewards)
    held = inputs["0_answers"]
    assert isinstance(held, Source)
    rows = pq.read_table(held.path / "responses.parquet", columns=["row_id"])["row_id"].to_pylist()
    asked = found[0].chosen["answers"].identity["config"]
    config = TokenScoreConfig(
        row_ids=tuple(choose_rows(rows, first, last)),
        max_tokens=asked["max_prompt_tokens"] + asked["max_new_tokens"],
        precision=asked["precision"],
    )
    planned: dict[str, Given] = {}
    for place, policy in enumerate(models):
        if place and policy and models[0]:
            given: dict[str, Given] = {"reference": models[0], "policy": policy}
            given |= {"reference_answers": held, "policy_answers": inputs[f"{place}_answers"]}
            planned[f"{place}_tokens"] = score_tokens(config, given, runtime=Runtime(), label=f"model {place + 1}")
    return planned


def find_measured(
    reference: str, *, model: str | None, store: Store, settings: Settings, tracking: Tracking
) -> Measured:
    """Return what a reference means: a run with what it measured, `champion`, a model of the store, or a source from outside."""
    run = name_run(reference)
    steps = read_steps(tracking.find_tags(run)) if run else {}
    said = [ref for key, ref in steps.items() if not key.endswith("champion")]
    if said and "train" not in steps:  # a run of benchmark: the model is what its evaluations read
        asked = [records.resolve(store, ref) for ref in said if ref.startswith(("evaluate/", "alignment/", "judge/"))]
        read = {model for record in asked if (model := find_asked(record, store=store))}
        if len(read) != 1:
            raise ValueError(
                f"run {run}: it measured {len(read)} models, expected one; name a run of align, benchmark or judge"
            )
        (digest,) = read
        made = [r for name in ("train", "reward_model") if (r := records.find(store, step=name, fingerprint=digest))]
        return Measured(reference, digest, made[0] if made else None, frozenset(said))
    if said or reference.partition(":")[0] == "champion" or STORED.fullmatch(reference):
        record = find_model(store, reference, tracking=tracking, model=model)
        return Measured(reference, record.fingerprint, record, frozenset(said) if said else None)
    source = resolve_source(reference, store=store, settings=settings)
    return Measured(reference, source.fingerprint, source=source)


def find_asked(record: Record, *, store: Store) -> str | None:
    """Return the fingerprint of the model that an evaluation by benchmark, reward model or judge is about; None where it is about no one."""
    if "answers" in record.inputs:
        return records.resolve(store, f"generate/{record.inputs['answers']}").inputs["policy"]
    return record.inputs.get("model")


def choose_alike(found: list[Measured], *, store: Store) -> None:
    """Choose of everything on record what was measured of all models in the same way, newest first.

    What only some have is left to each of them, for the comparison to say so.
    """
    kinds = ("prompt_set", "generate", "evaluate", "score_rewards", "judge")
    measured = sorted((r for kind in kinds for r in records.iterate(store, kind)), key=lambda r: r.created)
    known = {record.fingerprint: record for record in measured if record.step in kinds[:2]}
    pools: dict[str, list[list[Record]]] = {}
    for record in measured:
        name, model = name_measure(record, known)
        for place, one in enumerate(found):
            if name and model == one.fingerprint and one.counts(record):
                pools.setdefault(name, [[] for _ in found])[place].append(record)
    for name, pool in sorted(pools.items()):  # answers before rewards
        if name == "rewards":
            of = [one.chosen["answers"].fingerprint if "answers" in one.chosen else "" for one in found]
            pool = [[r for r in own if r.inputs["rows"] == which] for own, which in zip(pool, of, strict=True)]
        for one, chosen in zip(found, choose_one(name, pool, found, known=known), strict=True):
            if chosen:
                one.chosen[name] = chosen
            if chosen and name.startswith(("set_", "judge_")):
                one.answered[name] = known[chosen.inputs.get("answers") or chosen.inputs["rows"]]


def name_measure(record: Record, known: Mapping[str, Record]) -> tuple[str, str]:
    """Return what a record measures, as `Measured.chosen` names it, and the fingerprint of the model; ("", "") where it measures none.

    `known` are the answers of all models and the sets that they may be to, by fingerprint.
    """
    if record.step == "evaluate":
        return f"eval_{record.identity['config']['name']}", record.inputs["model"]
    given = record.inputs.get("answers" if record.step == "judge" else "rows", "")
    answers = record if record.step == "generate" else known.get(given)
    if answers is None or answers.step != "generate":
        return "", ""
    asked, policy = known.get(answers.inputs["rows"]), answers.inputs["policy"]
    if record.step == "judge":
        config = record.identity["config"]
        return f"judge_{EvalSetConfig(name=config['benchmark'], limit=config['limit']).title}", policy
    if asked is None:  # held-out rows
        return "answers" if record.step == "generate" else "rewards", policy
    if asked.step == "prompt_set" and record.step == "score_rewards":
        config = asked.identity["config"]
        return f"set_{EvalSetConfig(name=config['name'], limit=config['limit']).title}", policy
    return "", ""


def choose_one(
    name: str, pool: list[list[Record]], found: list[Measured], *, known: Mapping[str, Record]
) -> list[Record | None]:
    """Return one record of each model, all of one identity but for the model; the newest of each where not all have any."""
    keys = [{fingerprint(strip(record, known)): record for record in own} for own in pool]
    if not all(keys):
        return [own[-1] if own else None for own in pool]
    common = [key for key in keys[0] if all(key in own for own in keys[1:])]
    if common:
        return [own[common[-1]] for own in keys]
    newest = pool[0][-1]
    key = fingerprint(strip(newest, known))
    place = next(place for place, held in enumerate(keys) if key not in held)
    first, other, whose = newest, pool[place][-1], found[place].name
    fields = "; ".join(diff_identities(*(strip(record, known) for record in (first, other)))[:5])
    raise ValueError(
        f"{MEASURE.sub('', name)}: scores of different profiles are never compared; {found[0].name} -> {whose}: {fields}; "
        "measure both in the same way first (`varflow benchmark`, `varflow judge`, or one run of the same recipe)"
    )


def strip(record: Record, known: Mapping[str, Record]) -> dict[str, Any]:
    """Return a record's identity without the model it is about, on disk or served. In place of the fingerprint of answers, which
    would name the model, stands their identity, and of the set that they are to."""
    inputs = {
        name: strip(known[given], known) if given in known else given
        for name, given in record.identity["inputs"].items()
        if name not in ("model", "policy")
    }
    config = {name: value for name, value in record.identity["config"].items() if name != "endpoint"}
    return record.identity | {"inputs": inputs, "config": config}


def describe_subject(one: Measured, *, store: Store) -> SubjectConfig:
    """Return a model's settings, data and cost as its records tell them."""
    settings: dict[str, Any] = {}
    data: dict[str, Any] = {}
    cost: dict[str, float] = {}
    made: tuple[Record, ...] = ()
    if one.record:
        lineage = read_lineage(store, one.record)
        made = lineage.steps
        for record in lineage.steps:
            settings |= {f"{record.step}.{name}": value for name, value in flatten(record.identity["config"]).items()}
        settings |= {role: f"{given.name} ({given.digest[:12]})" for role, given in lineage.sources.items()}
        if rows := lineage.find("ingest"):
            data = flatten({name: value for name, value in rows.summary.items() if name != "metrics"})
        cost = dict(lineage.wall_seconds)
    for name, record in one.chosen.items():
        seconds = (r.cost.get("wall_seconds", 0.0) for r in (record, one.answered.get(name)) if r)
        cost[f"measuring: {MEASURE.sub('', name)}"] = sum(seconds)
    total = total_costs(record.cost for record in (*made, *one.chosen.values(), *one.answered.values()))
    if total.usd is not None:
        cost |= {"all of it, USD": total.usd, "without a price, seconds": total.unpriced_seconds}
    return SubjectConfig(name=shorten(one), ref=one.ref, settings=settings, data=data, cost=cost)


def shorten(one: Measured) -> str:
    """Return a name short enough for a table: the reference as it was given, digests cut."""
    if name_run(one.name):
        return f"run {name_run(one.name)[:8]}"  # type: ignore[index]
    head, _, tail = one.name.rpartition("/")
    return f"{head}/{tail[:12]}" if head and one.record else one.name
