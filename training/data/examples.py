"""Rows joined with their stored columns and rendered: what a policy is trained on. Every row left out is counted by reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from training.data.rows import iterate_rows
from training.data.schema import digest_row
from training.data.selection import Select
from training.objectives.objective import FloatArray
from training.render import Rendered, Renderer, UnusableRow

# K responses of a row


@dataclass(frozen=True)
class Example:
    """A row ready to train on. `samples` are its K rendered responses; `places` says which of the row's responses they are."""

    row_id: str
    samples: tuple[Any, ...]
    places: tuple[int, ...]
    num_responses: int  # of the row, with those that are not trained
    num_tokens_K: np.ndarray  # trained tokens of each sample
    preferred: int | None = None  # which of the samples; None where nobody said, or it is not trained
    reward_K: FloatArray | None = None
    logp_ref_K: FloatArray | None = None
    logq_K: FloatArray | None = None


# By row id: `content_id` of what was scored, and lists with a value for each response.
Scores = dict[str, dict[str, Any]]


def read_scores(folder: Path, column: str, *, columns: Sequence[str] = ()) -> Scores:
    """Return what a score folder has of each row: `column` and, where asked for, others. ValueError for a row with two scores."""
    path = folder / "scores.parquet"
    if not path.is_file():
        raise ValueError(f"{column} folder {folder}: no scores.parquet; expected one; score the rows again")
    names = ["content_id", column, *columns]
    if missing := sorted({"row_id", *names} - set(pq.read_schema(path).names)):
        raise ValueError(f"{path}: no column {', '.join(missing)}; expected it beside the scores; score the rows again")
    rows = pq.read_table(path, columns=["row_id", *names]).to_pylist()
    twice = [row_id for row_id, count in Counter(row["row_id"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(
            f"{column} folder {folder}: {len(twice)} rows are there more than once (first: {', '.join(twice[:3])}); expected each once; "
            "score the rows again"
        )
    return {row["row_id"]: {name: row[name] for name in names} for row in rows}


def load_examples(
    rows: Path,
    renderer: Renderer,
    *,
    select: Select,
    rewards: Scores | None = None,
    reference: Scores | None = None,
    min_responses: int = 1,
    unscored: frozenset[str] = frozenset(),
    distinct: bool = False,
    split: str = "train",
    limit: int | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Return the rows of a split as examples, `limit` at most, and the number of rows dropped by reason.

    `distinct` takes responses of a row that are the same tokens, as where the chat template trims them, for one.

    A row that loses a response as too long or unusable is dropped whole, never renormalised: what is left of a group is another
    prompt's worth of evidence. Rows in `unscored` were dropped by a scorer, with its own reasons. ValueError for rows that a column
    lacks, for columns of other rows or of other responses to them, and for a reference that read other tokens.
    """
    columns = {name: scores for name, scores in (("reward", rewards), ("logp_ref", reference)) if scores is not None}
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    missing: list[str] = []
    first = ""
    for row in iterate_rows(rows, split=split):
        if len(examples) == limit:
            break
        if row["row_id"] in unscored:
            dropped["not_scored"] += 1
            continue
        if any(row["row_id"] not in scores for scores in columns.values()):
            missing.append(row["row_id"])
            continue
        check_content(row, columns)
        try:
            chosen = choose_responses(row, renderer, select, min_responses=min_responses, distinct=distinct)
        except UnusableRow as unusable:
            dropped[unusable.reason] += 1
            first = first or f"; row {row['row_id']}: {unusable}"
        else:
            examples.append(make_example(row, chosen, rewards=rewards, reference=reference))
    if missing:
        raise ValueError(
            f"rows folder {rows}: {len(missing)} rows of the {split} split have no reward or no reference log-probability "
            f"(first: {', '.join(missing[:3])}); expected every row to be scored; these columns are of another data set: score again"
        )
    if not examples and split == "train":
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "the split is empty"
        raise ValueError(
            f"rows folder {rows}: no row of the train split is left ({counts}); raise max_tokens, or bring rows that this "
            f"objective can train on{first}"
        )
    return examples, dropped


def choose_responses(
    row: dict[str, Any], renderer: Renderer, select: Select, *, min_responses: int, distinct: bool
) -> dict[int, Rendered]:
    """Return the responses of a row that are trained on, by their places; UnusableRow where they are too few, or one does not fit."""
    places = select(row)
    if not places:
        raise UnusableRow("no_preference", "no response is preferred to the others")
    if len(places) < min_responses:
        raise UnusableRow("too_few_responses", f"{len(places)} to train on, expected at least {min_responses}")
    chosen = dict(zip(places, renderer.stored(row, places), strict=True))
    if distinct:
        chosen = drop_equal_tokens(chosen, preferred=row["preferred"])
    if len(chosen) < min_responses:
        raise UnusableRow("same_tokens", f"{len(chosen)} different ones, expected at least {min_responses}")
    return chosen


def check_content(row: dict[str, Any], columns: Mapping[str, Scores]) -> None:
    """Raise ValueError where a column is of other responses: sampled again, a prompt keeps its row id."""
    content_id = digest_row(row["prompt"], row["responses"])
    for name, scores in columns.items():
        if scores[row["row_id"]]["content_id"] != content_id:
            raise ValueError(
                f"row {row['row_id']}: its {name} is of another prompt or other responses than the row has; expected these; they were "
                "changed, or sampled again, since they were scored: score these rows"
            )


def drop_equal_tokens(chosen: dict[int, Rendered], *, preferred: int | None) -> dict[int, Rendered]:
    """Return responses by their places in a row; of those with the same tokens the preferred one alone, or the first."""
    found: dict[bytes, int] = {}
    for place, sample in chosen.items():
        tokens = sample.ids_T.tobytes()
        if tokens not in found or place == preferred:
            found[tokens] = place
    return {place: chosen[place] for place in found.values()}


def make_example(
    row: dict[str, Any],
    chosen: dict[int, Rendered],
    *,
    rewards: Scores | None,
    reference: Scores | None,
) -> Example:
    """Pick the columns of the chosen responses of a row, by their places in it."""
    places, samples = list(chosen), tuple(chosen.values())
    num_tokens_K = np.array([sample.num_trained for sample in samples])
    logp_ref_K = pick(row, reference, "logp", places)
    if reference is not None:
        scored_K = pick(row, reference, "num_tokens", places)
        if scored_K is None or not np.array_equal(scored_K, num_tokens_K):
            raise ValueError(
                f"row {row['row_id']}: the reference was scored on {scored_K} trained tokens, here they are {num_tokens_K}; "
                "expected the same; reference and base have different tokenizers or chat templates: score with this base"
            )
    return Example(
        row_id=row["row_id"],
        samples=samples,
        places=tuple(places),
        num_responses=len(row["responses"]),
        num_tokens_K=num_tokens_K,
        preferred=place_preferred(row, places),
        reward_K=pick(row, rewards, "reward", places),
        logp_ref_K=logp_ref_K,
        logq_K=np.array([np.nan if row["logq"] is None else row["logq"][k] for k in places]),
    )


def place_preferred(row: dict[str, Any], places: list[int]) -> int | None:
    """Return which of the responses at some places is the preferred one, or equal to it; None where none is."""
    if row["preferred"] is None:
        return None
    responses = row["responses"]
    if not 0 <= row["preferred"] < len(responses):
        raise ValueError(
            f"row {row['row_id']}: preferred is {row['preferred']}, expected the place of one of its {len(responses)} responses, from 0; ingest the rows"
        )
    equal = (n for n, k in enumerate(places) if responses[k] == responses[row["preferred"]])
    return next(equal, None)


def pick(row: dict[str, Any], scores: Scores | None, name: str, places: list[int]) -> np.ndarray | None:
    """Return the values of a stored list at some places, float64; None without the column, NaN for nulls."""
    if scores is None:
        return None
    values = scores[row["row_id"]][name]
    if values is None or len(values) != len(row["responses"]):
        raise ValueError(
            f"row {row['row_id']}: {name} has {'no' if values is None else len(values)} values, the row "
            f"{len(row['responses'])} responses; expected one each; score the rows again"
        )
    return np.array([values[k] for k in places], dtype=np.float64)
