"""A benchmark's artifact folder, read and paired with another one: only items and profiles that agree are ever compared."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from training.config import Config
from training.job import read_json_lines

ItemKey = tuple[str, str]  # task, doc_id
MODEL_FIELD = "model"  # of a profile: what the two policies may differ in


class ScoreRow(Config):
    """One line of scores.json. Exactly the rows that `decides` are the benchmark's own number."""

    model_config = ConfigDict(extra="allow")  # what else the harness tells is kept for the report

    benchmark: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    task_version: str | int | float | None
    num_fewshot: int | None
    decides: bool
    harness_version: str
    flag: str | None = None  # why the score may not say what it seems to


@dataclass(frozen=True)
class BenchmarkResult:
    """One model's result on one benchmark: its score rows, the deciding score of every item, and what makes it comparable."""

    benchmark: str
    scores: tuple[ScoreRow, ...]
    items: dict[ItemKey, float]
    profile: dict[str, Any]
    questions: dict[ItemKey, str] = field(default_factory=dict)  # what each item asks, without worked examples

    @cached_property
    def keys(self) -> tuple[ItemKey, ...]:
        """The items in an order that no file decides."""
        return tuple(sorted(self.items))

    @cached_property
    def strata(self) -> NDArray[np.int64]:
        """The number of each item's task, in the order of `keys`."""
        codes: dict[str, int] = {}
        return np.array([codes.setdefault(task, len(codes)) for task, _ in self.keys], dtype=np.int64)

    @property
    def score(self) -> float:
        """Mean over all items, so that several tasks weigh by their size."""
        return math.fsum(self.items.values()) / len(self.items)


def read_result(folder: Path) -> BenchmarkResult:
    """Read `scores.json`, `samples.jsonl` and `profile.json`; refuse a folder whose items and score disagree."""
    missing = [name for name in ("scores.json", "samples.jsonl", "profile.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"benchmark result {folder}: {', '.join(missing)} not there; run the benchmark step again")
    scores = tuple(ScoreRow.model_validate(row) for row in json.loads((folder / "scores.json").read_text()))
    names = sorted({row.benchmark for row in scores})
    if len(names) != 1:
        raise ValueError(
            f"benchmark result {folder}: scores.json must speak of one benchmark; got {names or 'no rows'}"
        )
    items = dict(_read_items(folder / "samples.jsonl"))
    result = BenchmarkResult(
        benchmark=names[0],
        scores=scores,
        items={key: score for key, (score, _) in items.items()},
        profile=json.loads((folder / "profile.json").read_text()),
        questions={key: question for key, (_, question) in items.items()},
    )
    _check_score(result, folder=folder)
    return result


def pair_items(
    challenger: BenchmarkResult, champion: BenchmarkResult
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both models' scores (n,) over the same items in the same order; refuse unlike profiles and unlike items."""
    assert challenger.benchmark == champion.benchmark, f"{challenger.benchmark} against {champion.benchmark}"
    name = challenger.benchmark
    check_profiles(name, challenger.profile, champion.profile)
    if challenger.items.keys() != champion.items.keys():
        only_challenger = sorted(challenger.items.keys() - champion.items.keys())
        only_champion = sorted(champion.items.keys() - challenger.items.keys())
        first = (only_challenger or only_champion)[0]
        raise ValueError(
            f"{name}: both models must have the same items; {len(only_challenger)} of {len(challenger.items)} are the "
            f"challenger's alone and {len(only_champion)} of {len(champion.items)} the champion's alone (first: "
            f"{first[0]}, document {first[1]}); evaluate both on the same benchmark data"
        )
    ours_N, theirs_N = (np.array([*map(side.items.__getitem__, champion.keys)]) for side in (challenger, champion))
    return ours_N, theirs_N


def check_profiles(
    name: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    who: tuple[str, str] = ("the challenger", "the champion"),
) -> None:
    """Raise ValueError, naming the fields, where two scores were not measured alike."""
    ours, theirs = ({k: v for k, v in profile.items() if k != MODEL_FIELD} for profile in (ours, theirs))
    unlike = [f"{field} is {a} and {b}" for field, a, b in diff_fields(ours, theirs)]
    if unlike:
        raise ValueError(
            f"{name}: scores of different profiles are never compared; of {who[0]} and {who[1]}, {', '.join(unlike)}; "
            f"evaluate {who[1]} again under {who[0]}'s profile"
        )


def diff_fields(ours: Any, theirs: Any, *, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted field, ours, theirs) of each value that differs between two JSON trees."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            below = f"{path}.{key}" if path else str(key)
            if key in ours and key in theirs:
                yield from diff_fields(ours[key], theirs[key], path=below)
            else:
                yield below, _show(ours, key), _show(theirs, key)
    elif ours != theirs:
        yield path, json.dumps(ours), json.dumps(theirs)


def _show(tree: dict[str, Any], key: str) -> str:
    return json.dumps(tree[key]) if key in tree else "absent"


def _read_items(path: Path) -> Iterator[tuple[ItemKey, tuple[float, str]]]:
    seen: set[ItemKey] = set()
    for number, item in enumerate(read_json_lines(path), start=1):
        key, score = (str(item["task"]), str(item["doc_id"])), float(item["correct"])
        if key in seen:
            raise ValueError(f"{path}, line {number}: {key[0]}, document {key[1]} is there twice; run the step again")
        if not 0 <= score <= 1:
            raise ValueError(f"{path}, line {number}: a score of an item lies from 0 to 1; got {score}")
        seen.add(key)
        yield key, (score, str(item.get("question", "")))  # results of evaluate version 2 have none


def _check_score(result: BenchmarkResult, *, folder: Path) -> None:
    if not result.items:
        raise ValueError(f"benchmark result {folder}: samples.jsonl has no items, so {result.benchmark} has no score")
    deciding = [row for row in result.scores if row.decides]
    n = sum(row.n for row in deciding)
    if not deciding or n != len(result.items):
        raise ValueError(
            f"benchmark result {folder}: the rows that decide {result.benchmark} cover {n} items and samples.jsonl has "
            f"{len(result.items)}; run the benchmark step again"
        )
    pooled = math.fsum(row.value * row.n for row in deciding) / n
    if abs(pooled - result.score) > 1e-6:
        raise ValueError(
            f"benchmark result {folder}: scores.json says {result.benchmark} = {pooled:.6f}, its {n} items say "
            f"{result.score:.6f}; run the benchmark step again"
        )
