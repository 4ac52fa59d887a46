"""Evaluation sets as rows: every different prompt once, the better answer first, limits that cut and no others."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from evaluation.config import PairSetConfig, PromptSetConfig
from evaluation.eval_sets import write_pairs, write_prompts
from training.data.schema import SCHEMA, digest_row

HH = [
    {"chosen": f"\n\nHuman: {ask}\n\nAssistant: yes", "rejected": f"\n\nHuman: {ask}\n\nAssistant: no"}
    for ask in ("Is it?", "Was it?", "Is it?", "Will it be?\n\nAssistant: When?\n\nHuman: Now")
]
OFFSETBIAS = [
    {"instruction": "Name a colour.", "output_1": "Red.", "output_2": "A colour is a thing that is seen.", "label": 1},
    {"instruction": "Name a number.", "output_1": "A number is a thing.", "output_2": "Two.", "label": 2},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path.parent


def read(output: Path) -> list[dict[str, Any]]:
    table = pq.read_table(output / "rows.parquet")
    assert table.schema.equals(SCHEMA)
    return table.to_pylist()


def test_a_prompt_that_is_there_twice_is_one_prompt(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "set/test.jsonl.gz", HH)
    write_lines(tmp_path / "set/train.jsonl", OFFSETBIAS)  # another split is none of the set
    counts = write_prompts(folder, PromptSetConfig(name="hha_helpful"), output=tmp_path)
    assert counts == {"read": 4, "unusable": 0, "repeated": 1, "rows": 3}
    rows = read(tmp_path)
    assert [[turn["content"] for turn in row["prompt"]] for row in rows] == [
        ["Is it?"],
        ["Was it?"],
        ["Will it be?", "When?", "Now"],
    ]
    assert [row["line"] for row in rows] == [1, 2, 4] and {row["split"] for row in rows} == {"heldout"}
    assert all(row["responses"] == [] and row["row_id"] == digest_row(row["prompt"], []) for row in rows)


def test_a_limit_takes_the_first_by_id_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    config = PromptSetConfig(name="hha_harmless", limit=2)
    assert config.title == "hha_harmless_part"
    chosen = []
    for place, rows in enumerate((HH, HH[::-1])):
        (tmp_path / f"out{place}").mkdir()
        write_prompts(write_lines(tmp_path / f"{place}/test.jsonl", rows), config, output=tmp_path / f"out{place}")
        chosen.append([row["row_id"] for row in read(tmp_path / f"out{place}")])
    everything = sorted(digest_row([{"role": "user", "content": ask}], []) for ask in ("Is it?", "Was it?"))
    assert chosen[0] == chosen[1] == sorted(chosen[0]) and len(chosen[0]) == 2
    assert set(chosen[0]) & set(everything)
    with pytest.raises(ValueError, match=r"hha_harmless .*test.jsonl: prompts: got the limit 4, there are 3; lower it"):
        write_prompts(tmp_path / "0", PromptSetConfig(name="hha_harmless", limit=4), output=tmp_path)


def test_offsetbias_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "set/train.jsonl", OFFSETBIAS)
    (folder / "README.md").write_text("a card")
    write_prompts(folder, PromptSetConfig(name="offsetbias"), output=tmp_path)
    assert [row["prompt"][0]["content"] for row in read(tmp_path)] == ["Name a colour.", "Name a number."]
    write_lines(tmp_path / "set/test.jsonl", OFFSETBIAS[1:])
    assert write_prompts(folder, PromptSetConfig(name="offsetbias"), output=tmp_path)["rows"] == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "got no file to read"),
        ({"train.jsonl": HH}, "got train.jsonl, expected test.jsonl"),
        ({"test.jsonl": HH, "test.jsonl.gz": HH}, "got test.jsonl, test.jsonl.gz, expected one of them"),
        ({"test.jsonl": OFFSETBIAS}, "2 of 2 rows are unusable"),
        ({"test.jsonl": [*HH * 4, "torn"]}, "1 of 17 rows are unusable, a share of at most 0.05 expected"),
        ({"test.jsonl": []}, "0 of 0 rows are unusable"),
    ],
)
def test_files_that_are_not_there_or_not_the_set_are_refused(tmp_path: Path, files: Any, said: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in files.items():
        write_lines(folder / name, rows)
    with pytest.raises(ValueError, match=r"hha_helpful|source") as refusal:
        write_prompts(folder, PromptSetConfig(name="hha_helpful"), output=tmp_path)
    assert said in str(refusal.value)
    assert not (tmp_path / "rows.parquet").exists()


def test_pairs_put_the_better_answer_first_and_a_pair_is_there_once(tmp_path: Path) -> None:
    pair = {"instruction": "Add 1 and 1.", "response1": "It is 3.", "response2": "2", "label": 2}
    content = {name: [{"bias": name, **pair, "instruction": name}] for name in ("length bias", "concreteness")}
    (tmp_path / "biasbench.json").write_text(json.dumps(content))
    assert write_pairs(tmp_path, PairSetConfig(name="evalbiasbench"), output=tmp_path) == {"rows": 2, "groups": 2}
    assert [(row["source"], row["responses"], row["line"]) for row in read(tmp_path)] == [
        ("length bias", ["2", "It is 3."], 1),
        ("concreteness", ["2", "It is 3."], 1),
    ]
    content["concreteness"] = [{**content["length bias"][0]}]
    (tmp_path / "biasbench.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 pairs are there more than once, of length bias, concreteness"):
        write_pairs(tmp_path, PairSetConfig(name="evalbiasbench"), output=tmp_path)


def test_the_real_sets_are_laid_out(real_data: Path, tmp_path: Path) -> None:
    """What is left out of HH-RLHF: unlike prompts (9 and 5 rows), equal answers, empty turns, turns out of order."""
    helpful = write_prompts(real_data / "hh-rlhf/helpful-base", PromptSetConfig(name="hha_helpful"), output=tmp_path)
    assert helpful == {"read": 2354, "unusable": 21, "repeated": 0, "rows": 2333}
    harmless = write_prompts(real_data / "hh-rlhf/harmless-base", PromptSetConfig(name="hha_harmless"), output=tmp_path)
    assert harmless == {"read": 2312, "unusable": 13, "repeated": 2, "rows": 2297}
    write_pairs(real_data / "evalbiasbench", PairSetConfig(name="evalbiasbench"), output=tmp_path)
    rows = read(tmp_path)
    assert len(rows) == 80 and Counter(row["source"] for row in rows)["length bias"] == 17
    assert all(len(row["responses"]) == 2 and row["preferred"] == 0 for row in rows)
    counts = write_pairs(real_data / "llmbar", PairSetConfig(name="llmbar", limit=47), output=tmp_path)
    assert counts == {"rows": 47 * 4 + 46, "groups": 5}
    with pytest.raises(ValueError, match="got the limit 135, there are 134"):
        write_pairs(real_data / "llmbar", PairSetConfig(name="llmbar", limit=135), output=tmp_path)
