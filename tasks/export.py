"""A model leaves the store: a folder as Hugging Face's libraries read it, with a card, there whole or not at all."""

import re
import shutil
import uuid
from collections.abc import Container, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from evaluation.alignment import AlignmentResult
from evaluation.gate.verdict import OlderVerdictError, Verdict
from evaluation.harness.result import read_result
from evaluation.pages.card import Card, CardRewards, CardScore, CardSource, CardStep, CardWinRate, render_card
from evaluation.statistics import score_interval, t_quantile
from infra import records, registry
from infra.fingerprint import visible_files
from infra.records import Given, Record
from infra.settings import Settings
from infra.store import Store, StoredFile
from tasks.artifacts import fetch_artifact
from tasks.candidate import list_verdicts, read_sealed
from tasks.execute import flatten
from tasks.lineage import Lineage, read_lineage
from tasks.sources import find_local

MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "adapter/*",
)  # fmt: skip
LICENCE = re.compile(r"^[^\n]{0,60}?\blicen[cs]e:\s*[\"']?([A-Za-z][\w.+-]*\w)", re.IGNORECASE | re.MULTILINE)
LICENCE_TITLES = {"Apache License": "apache-2.0", "MIT License": "mit", "The MIT License": "mit"}


def export(store: Store, record: Record, folder: Path, *, settings: Settings) -> list[str]:
    """Write a model and its card to a folder that is not there yet, or empty; return the names of its files.

    Raises ValueError for a folder in use, StoreError for files that are not the recorded ones.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: got a place in use, expected a new or empty folder; name another, or move it away")
    files = [file for file in record.files if is_model_file(file.name)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        store.download_folder(record.prefix, files, staging)
        (staging / "README.md").write_text(render_card(describe_model(store, record, files=files, settings=settings)))
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(visible_files(folder))


def is_model_file(name: str) -> bool:
    """Tell whether a file of an artifact belongs to the model, and not to the story of its training."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def describe_model(store: Store, record: Record, *, files: list[StoredFile], settings: Settings) -> Card:
    """Return all that the card says, from the records of the model, of what it was made of, and of what was said about it."""
    lineage = read_lineage(store, record)
    sources = [describe_source(role, given, settings=settings) for role, given in lineage.sources.items()]
    base = next((source for source in sources if source.role == f"{record.step}.base"), None)
    rows, reward = lineage.find("ingest"), lineage.find("reward_model")
    verdict, verdict_ref = newest_verdict(store, record)
    ref = record.ref
    answers = {r.fingerprint for r in records.iterate(store, "generate") if r.inputs["policy"] == record.fingerprint}
    return Card(
        title=f"{base.name if base else record.step} aligned, {record.fingerprint[:12]}",
        ref=ref,
        digest=records.digest_files(record),
        base=base.name if base else None,
        licence=base.licence if base else None,
        objective=str(record.identity["config"].get("objective", record.step)),
        training=flatten(record.identity["config"]),
        figures=figures_of(record),
        data=flatten(figures_of(rows)) if rows else {},
        reward=describe_reward(lineage),
        reward_figures=figures_of(reward) if reward else {},
        scores=tuple(describe_score(store, done, settings=settings) for done in list_evaluations(store, record)),
        rewards=tuple(list_rewards(store, answers, settings=settings)),
        win_rates=tuple(list_win_rates(store, answers)),
        verdict=verdict,
        verdict_ref=verdict_ref,
        promoted=describe_promotion(store, ref),
        sources=tuple(sources),
        steps=tuple(describe_step(step) for step in lineage.steps),
        files={file.name: file.sha256 for file in files},
        adapter=any(file.name.startswith("adapter/") for file in files),
        commit=str(record.provenance.get("commit", "")),
        versions=record.provenance.get("versions", {}),
    )


def figures_of(record: Record) -> dict[str, Any]:
    """Return a record's summary without what is not about the artifact."""
    return {name: value for name, value in record.summary.items() if name not in {"metrics", "plan"}}


def describe_reward(lineage: Lineage) -> str | None:
    """Return what scored the responses: a model that was trained, or one that was given."""
    if trained := lineage.find("reward_model"):
        base = lineage.sources.get("reward_model.base")
        made_of = f" on {base.name}" if base else ""
        return f"reward_model/{trained.fingerprint[:16]}, trained on the train split{made_of}"
    given = lineage.sources.get("score_rewards.scorer")
    return given.name if given else None


def describe_step(record: Record) -> CardStep:
    """Return a line of the lineage."""
    seconds = record.cost.get("wall_seconds", 0.0)
    return CardStep(step=record.step, fingerprint=record.fingerprint, created=record.created, wall_seconds=seconds)


def describe_source(role: str, given: Given, *, settings: Settings) -> CardSource:
    """Return a source with the licence that its files state."""
    return CardSource(
        role=role, name=given.name, digest=given.digest, licence=find_licence(given.name, settings=settings)
    )


def find_licence(name: str, *, settings: Settings) -> str | None:
    """Return the licence that a source's own files state, None where they state none or are not on this machine.

    In a model card's or README's `license: NAME`, else in the title of a licence file.
    """
    for folder in find_local(name, settings=settings):
        readme = folder / "README.md"
        if readme.is_file() and (stated := LICENCE.search(readme.read_text(errors="replace"))):
            return stated[1].lower()
        for path in sorted(folder.glob("LICEN[SC]E*")):
            head = path.read_text(errors="replace")[:400]
            known = [licence for title, licence in LICENCE_TITLES.items() if title in head]
            if known:
                return known[0]
    return None


def newest_verdict(store: Store, record: Record) -> tuple[Verdict | None, str]:
    """Return the newest verdict about a model with its reference, without it where an older gate wrote it; (None, "") where the gate
    said nothing. Raises ValueError for one that was changed."""
    for verdict in list_verdicts(store, record)[:1]:
        try:
            return read_sealed(store, verdict), f"gate/{verdict.fingerprint}"
        except OlderVerdictError:
            return None, f"gate/{verdict.fingerprint}"
    return None, ""


def describe_promotion(store: Store, ref: str) -> str | None:
    """Return when and why the model became champion, None where it never was."""
    for model in registry.list_models(store):
        for entry in reversed(registry.read_history(store, model)):
            if entry.ref == ref and entry.move in (registry.Move.promoted, registry.Move.rolled_back):
                by_hand = "" if entry.verdict else f", without the gate: {entry.reason}"
                what = "Promoted to" if entry.move is registry.Move.promoted else "Rolled back to as"
                return f"{what} champion of {model} at {entry.at} by {entry.by} (entry {entry.number}){by_hand}."
    return None


def list_evaluations(store: Store, model: Record) -> list[Record]:
    """Return a model's evaluation on each benchmark: the one that its newest verdict weighed, else the newest.

    Those by an endpoint are of what it serves, whatever that is.
    """
    about = [
        record
        for record in records.iterate(store, "evaluate")
        if record.inputs["model"] == model.fingerprint and not record.identity["config"].get("endpoint")
    ]
    weighed = {given for verdict in list_verdicts(store, model)[:1] for given in verdict.inputs.values()}
    ordered = sorted(about, key=lambda record: (record.fingerprint in weighed, record.created))
    chosen = {record.identity["config"]["name"]: record for record in ordered}
    return [chosen[name] for name in sorted(chosen)]


def describe_score(store: Store, record: Record, *, settings: Settings) -> CardScore:
    """Return a benchmark's deciding score with its interval."""
    result = read_result(fetch_artifact(store, record, home=settings.home))
    row = next(row for row in result.scores if row.decides)
    low, high = score_interval(list(result.items.values()))
    return CardScore(
        benchmark=result.benchmark, metric=row.metric, filter=row.filter, value=row.value, low=low, high=high, n=row.n,
        num_fewshot=row.num_fewshot, harness_version=row.harness_version,
    )  # fmt: skip


def list_rewards(store: Store, answers: Container[str], *, settings: Settings) -> Iterator[CardRewards]:
    """Yield the newest rewards of a model's answers on each prompt set by each reward model, alone or against a baseline."""
    newest: dict[tuple[str, str, str | None], Record] = {}
    for record in sorted(records.iterate(store, "alignment"), key=lambda record: record.created):
        if record.inputs["answers"] in answers:
            scorer = name_input(store, "score_rewards", record.inputs["rewards"], "scorer")
            against = record.inputs.get("baseline_answers")
            baseline = name_input(store, "generate", against, "policy") if against else None
            newest[str(record.summary["benchmark"]), scorer, baseline] = record
    for (_, scorer, baseline), record in sorted(newest.items(), key=lambda item: (*item[0][:2], item[0][2] or "")):
        folder = fetch_artifact(store, record, home=settings.home)
        result = AlignmentResult.model_validate_json((folder / "alignment.json").read_text())
        mean, stderr = result.model.reward, result.model.stderr
        reach = None if stderr is None else t_quantile(0.975, result.n - 1) * stderr
        interval = None if reach is None else (mean - reach, mean + reach)
        yield CardRewards(result=result, interval=interval, scorer=scorer, baseline=baseline)


def list_win_rates(store: Store, answers: Container[str]) -> Iterator[CardWinRate]:
    """Yield the newest win rate of a model's answers by each judge against each other's: a baseline's, or those of a champion of then."""
    newest: dict[tuple[str, str, str], Record] = {}
    for record in sorted(records.iterate(store, "judge"), key=lambda record: record.created):
        given = record.inputs
        if given.get("answers", given.get("challenger_answers")) in answers:
            held = "champion_answers" in given
            against = (
                name_input(store, "generate", given["champion_answers"], "policy")
                if held
                else str(record.identity["config"]["baseline"])
            )
            newest[str(record.summary["benchmark"]), against, str(record.summary["judge"])] = record
    for (benchmark, against, judge), record in sorted(newest.items()):
        told = record.summary
        yield CardWinRate(
            benchmark=benchmark, judge=judge, against=against, value=told["value"], low=told["low"], high=told["high"], n=told["items"],
            flag=told["flag"],
        )  # fmt: skip


def name_input(store: Store, step: str, fingerprint: str, name: str) -> str:
    """Return what a step's input was called; of a record that is gone, that it is."""
    found = records.read_record(store, step=step, fingerprint=fingerprint)
    return found[0].given[name].name if found else "on record no more"
