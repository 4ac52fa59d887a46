"""Evaluation sets as rows: prompts for policies to answer, and pairs of answers that test a reward model.

Rows have the schema of every other row, in split `heldout`, so that the steps `generate` and `score_rewards` take them as they are.
"""

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluation.config import PairSetConfig, PromptSetConfig
from evaluation.judges.arena_hard import QUESTIONS_FILE, read_questions
from evaluation.judges.sets import JudgeItem, read_evalbiasbench, read_llmbar
from training.config import IngestConfig, ResponseRegime, SourceFormat
from training.data.rows import RowsWriter
from training.data.schema import SCHEMA, digest_row
from training.data.sources import list_files, read_source
from training.data.validate import Message, UnusableRow, parse_row

FOLDERS = {  # below the folder of benchmark files
    "hha_helpful": "hh-rlhf/helpful-base",
    "hha_harmless": "hh-rlhf/harmless-base",
    "offsetbias": "offsetbias",
    "arena_hard": "arena-hard-v0.1",
    "evalbiasbench": "evalbiasbench",
    "llmbar": "llmbar",
}
SPLITS = {  # the file that is read, the first one there is: the hub has OffsetBias as train.jsonl alone
    "hha_helpful": ("test",),
    "hha_harmless": ("test",),
    "offsetbias": ("test", "train"),
}
INGEST = IngestConfig(responses=ResponseRegime.support)  # what a row must be, as for training data
Row = dict[str, Any]


def write_prompts(folder: Path, config: PromptSetConfig, *, output: Path) -> dict[str, int]:
    """Write `rows.parquet`: each different prompt of the set once, without responses. Returns the counts.

    A row that ingestion would not take is left out and counted; more of them than ingestion allows is a ValueError, and so is a
    limit beyond the prompts. Rows of arena_hard keep the ids of its questions, by which a judge finds the other answers.
    """
    file = folder / QUESTIONS_FILE if config.name == "arena_hard" else find_file(folder, config.name)
    rows: dict[str, Row] = {}
    counts = {"read": 0, "unusable": 0, "repeated": 0}
    for row_id, prompt, line in read_prompts(file, config.name, counts=counts):
        counts["repeated"] += row_id in rows
        rows.setdefault(row_id, make_row(row_id, prompt, [], preferred=None, source=file.name, line=line))
    if counts["unusable"] > INGEST.max_invalid_fraction * counts["read"] or not rows:
        raise ValueError(
            f"{config.name} {file}: {counts['unusable']} of {counts['read']} rows are unusable, a share of at most "
            f"{INGEST.max_invalid_fraction:g} expected, and at least one prompt; fetch the file again"
        )
    if config.limit is not None:
        check_limit(config.limit, len(rows), what=f"{config.name} {file}: prompts")
        rows = {row_id: rows[row_id] for row_id in heapq.nsmallest(config.limit, rows)}
    write_rows(list(rows.values()), output)
    return counts | {"rows": len(rows)}


def write_pairs(folder: Path, config: PairSetConfig, *, output: Path) -> dict[str, int]:
    """Write `rows.parquet`: each pair with the better answer first; a row's `source` is its group. Returns the counts.

    Raises ValueError for a limit beyond the largest group, and for a pair that is there twice.
    """
    items = {"evalbiasbench": read_evalbiasbench, "llmbar": read_llmbar}[config.name](folder)
    groups: dict[str, list[JudgeItem]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    if config.limit is not None:
        check_limit(config.limit, max(map(len, groups.values())), what=f"{config.name} {folder}: pairs of a group")
    rows = []
    for group, members in groups.items():
        for place, item in enumerate(members[: config.limit]):
            prompt, responses = [{"role": "user", "content": item.instruction}], [item.chosen, item.rejected]
            row_id = digest_row(prompt, responses)
            rows.append(make_row(row_id, prompt, responses, preferred=0, source=group, line=place + 1))
    ids = [row["row_id"] for row in rows]
    twice = [row["source"] for row in rows if ids.count(row["row_id"]) > 1]
    if twice:
        raise ValueError(
            f"{config.name} {folder}: {len(twice)} pairs are there more than once, of {', '.join(dict.fromkeys(twice))}; "
            "expected each once; fetch the files again"
        )
    write_rows(rows, output)
    return {"rows": len(rows), "groups": len(groups)}


def find_file(folder: Path, name: str) -> Path:
    """Return the file of a prompt set, plain or gzipped; ValueError where it is not there, or there twice."""
    files = list_files(folder)[0]
    for split in SPLITS[name]:
        found = [path for path in files if path.name.partition(".")[0] == split]
        if len(found) > 1:
            raise ValueError(f"{name} {folder}: got {', '.join(p.name for p in found)}, expected one of them; keep one")
        if found:
            return found[0]
    names = " or ".join(f"{split}.jsonl" for split in SPLITS[name])
    raise ValueError(f"{name} {folder}: got {', '.join(p.name for p in files)}, expected {names}, perhaps as .gz")


def read_prompts(file: Path, name: str, *, counts: dict[str, int]) -> Iterator[tuple[str, list[Message], int]]:
    """Yield (row id, prompt, line) of every usable row, counting all that are read and those left out."""
    if name == "arena_hard":
        for line, (uid, question) in enumerate(read_questions(file.parent).items(), start=1):
            counts["read"] += 1
            yield uid, [{"role": "user", "content": question}], line
        return
    is_hh = name != "offsetbias"
    for row in read_source(file):
        counts["read"] += 1
        try:
            if is_hh:
                parsed = parse_row(row.value, format=SourceFormat.hh_rlhf, config=INGEST)
            else:
                parsed = parse_row(as_responses(row.value), format=SourceFormat.responses, config=INGEST)
        except UnusableRow:
            counts["unusable"] += 1
            continue
        yield digest_row(parsed.prompt, []), parsed.prompt, row.line


def as_responses(value: Any) -> Any:
    """Return a row of OffsetBias, as the hub has it, in the format `responses`; anything else as it is."""
    if not isinstance(value, dict) or not {"instruction", "output_1", "output_2"} <= value.keys():
        return value
    return {"prompt": value["instruction"], "responses": [value["output_1"], value["output_2"]]}


def check_limit(limit: int, available: int, *, what: str) -> None:
    """Raise ValueError for a limit beyond the data, which would name a whole set as a part."""
    if limit > available:
        raise ValueError(f"{what}: got the limit {limit}, there are {available}; lower it, or leave it out for all")


def make_row(
    row_id: str, prompt: list[Message], responses: list[str], *, preferred: int | None, source: str, line: int
) -> Row:
    """Return a row of the schema."""
    return {
        "row_id": row_id,
        "split": "heldout",
        "prompt": prompt,
        "responses": responses,
        "preferred": preferred,
        "truncated": None,
        "logq": None,
        "source": source,
        "line": line,
    }


def write_rows(rows: list[Row], output: Path) -> None:
    """Write `rows.parquet`, whole or not at all."""
    with RowsWriter(output / "rows.parquet", SCHEMA) as out:
        out.write(rows)
