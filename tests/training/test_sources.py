"""Every kind of file gives the same rows; what is broken is said, by line or for the file as a whole."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data import sources
from training.data.sources import read_source

VALUES = [{"prompt": f"Question {n}? äöü ]}},", "chosen": "yes [1, 2]", "rejected": 'no "x" \\'} for n in range(7)]
LINES = "".join(json.dumps(value) + "\n" for value in VALUES)


def write_as(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(VALUES), path, row_group_size=3)
        return path
    text = LINES if "jsonl" in kind else json.dumps(VALUES, ensure_ascii=False, indent=1)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("chunk_bytes", [1, 5, 2**18])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_kind_gives_the_same_rows(
    tmp_path: Path, kind: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    path = write_as(tmp_path, kind)
    rows = list(read_source(path))
    assert [row.value for row in rows] == VALUES
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert {row.source for row in rows} == {path.name}
    assert all(json.loads(row.raw()) == row.value for row in rows)
    done = [row.bytes_done for row in rows]
    assert done == sorted(done) and 0 < done[-1] <= path.stat().st_size


def test_a_folder_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b/rows.jsonl", "a/rows.json", "c.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = f'{{"from": "{name}"}}\n'.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert [(row.source, row.value["from"]) for row in read_source(tmp_path)] == [
        ("a/rows.json", "a/rows.json"),  # a .json file of lines is read as lines
        ("b/rows.jsonl", "b/rows.jsonl"),
        ("c.jsonl.gz", "c.jsonl.gz"),
    ]
    assert sources.list_files(tmp_path)[1] == [".hidden.jsonl", "README.md"]


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n\xff\xfe\n' + deep + b'\n{"a": 2}')
    rows = list(read_source(path))
    assert [(row.line, row.value) for row in rows if row.problem is None] == [(1, {"a": 1}), (6, {"a": 2})]
    broken = {row.line: row for row in rows if row.problem}
    assert sorted(broken) == [3, 4, 5]
    assert broken[4].raw() == "\\xff\\xfe"
    assert broken[5].raw().endswith("(100000 characters in all)") and len(broken[5].raw()) < 21_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2}', "breaks after item 1"),
        ('[{"a": 1} {"a": 2}]', "breaks after item 0"),
        ('[{"a": 1}, {"a": }]', "breaks after item 1"),
        ('[{"a": 1}]\n[{"a": 2}]', "text after the end"),
        ("[", "breaks after item 0"),
    ],
)
def test_a_broken_list_is_refused_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_source(tmp_path / "rows.json"))


def test_an_empty_list_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(" [ ] \n")
    assert list(read_source(tmp_path / "rows.json")) == []


def test_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(LINES.encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: the gzip stream is broken"):
        list(read_source(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "plain.jsonl.gz").write_text(LINES)
    with pytest.raises(ValueError, match=r"plain\.jsonl\.gz: the gzip stream is broken"):
        list(read_source(tmp_path / "plain.jsonl.gz"))
    (tmp_path / "fake.parquet").write_text(LINES)
    with pytest.raises(ValueError, match=r"fake\.parquet: not a readable parquet file"):
        list(read_source(tmp_path / "fake.parquet"))
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv: got a file of another kind"):
        list(read_source(tmp_path / "rows.csv"))
    with pytest.raises(ValueError, match="no such file or folder"):
        list(read_source(tmp_path / "absent"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="got no file to read among 0"):
        list(read_source(tmp_path / "folder"))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_ITEM_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n"' + "x" * 2000)
    with pytest.raises(ValueError, match="line 2: longer than 1000 bytes"):
        list(read_source(tmp_path / "rows.jsonl"))
