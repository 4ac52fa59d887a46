"""Benchmark items in the training data of a model that is benchmarked; the gate looks for the same in its challenger's."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from infra import records
from infra.settings import Settings
from infra.store import Store
from tasks.sources import resolve_source
from tasks.step import Attempt, Given, Metrics, Planned, Source, step
from training.config import Config, Runtime
from training.data.rows import iterate_rows
from training.job import write_json

if TYPE_CHECKING:
    from evaluation.harness.contamination import Contamination

FILE = "contamination.json"


class ContaminationConfig(Config):
    """Nothing to choose: what is found follows from rows and benchmarks."""


@step(version=1)
def contamination(config: ContaminationConfig, attempt: Attempt) -> Metrics:
    """Look for benchmark items in what a model was trained on. Inputs: `rows_<n>`, whose train splits it was trained on, and
    `eval_<benchmark>`."""
    from evaluation.harness.contamination import flag_contamination, measure_contamination
    from evaluation.harness.result import read_result

    folders = sorted(attempt.inputs.items())
    results = [read_result(folder) for name, folder in folders if name.startswith("eval_")]
    texts = chain.from_iterable(read_training_texts(folder) for name, folder in folders if name.startswith("rows_"))
    found = measure_contamination(results, None, texts)
    write_contamination(found, attempt.output)
    flags = {each.benchmark: flag for each in found for flag in flag_contamination(each)}
    write_json(attempt.output / "summary.json", {"flags": flags})
    metrics = {f"eval/{each.benchmark}/in_training_data": each.share for each in found}
    clean = {f"eval/{each.benchmark}/not_in_training_data": c.value for each in found if (c := each.challenger_clean)}
    return metrics | clean


def plan_contamination(
    model: Source, evaluations: Mapping[str, Given], *, store: Store, settings: Settings, runtime: Runtime
) -> Planned | None:
    """Return the step that looks for the benchmarks' items in what a model was trained on, None where nothing of that is in the store."""
    rows = find_training_rows(store, model.name)
    if not rows:
        return None
    inputs: dict[str, Given] = {
        f"rows_{place}": resolve_source(ref, store=store, settings=settings) for place, ref in enumerate(rows)
    }
    inputs |= {f"eval_{name}": evaluation for name, evaluation in evaluations.items()}
    return contamination(ContaminationConfig(), inputs, runtime=runtime)


def find_training_rows(store: Store, model: str) -> list[str]:
    """Return the rows that are in the store of those that a policy, and each policy that it was trained from, were trained on.

    `model` is a reference; of a model that no step `train` made there are none.
    """
    found: dict[str, None] = {}
    kind, _, fingerprint = model.partition("/")
    while kind == "train" and (made := records.read_record(store, step=kind, fingerprint=fingerprint)):
        record, _ = made
        if rows := records.find(store, step="ingest", fingerprint=record.inputs["rows"]):
            found[f"ingest/{rows.fingerprint}"] = None
        kind, _, fingerprint = record.given["base"].name.partition("/")
    return [*found]


def read_training_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (row id, text) of every turn and response of the train split, a few rows in memory at a time."""
    for row in iterate_rows(folder, split="train", columns=["row_id", "prompt", "responses"]):
        yield from ((row["row_id"], text) for text in (*(turn["content"] for turn in row["prompt"]), *row["responses"]))


def write_contamination(found: "Sequence[Contamination]", folder: Path) -> None:
    """Write what was found of each benchmark."""
    write_json(folder / FILE, [each.model_dump(mode="json") for each in found])


def read_contamination(folder: Path) -> "tuple[Contamination, ...]":
    """Return what the gate, or the step `contamination`, found of each benchmark."""
    from evaluation.harness.contamination import Contamination

    return tuple(Contamination.model_validate(found) for found in json.loads((folder / FILE).read_text()))
