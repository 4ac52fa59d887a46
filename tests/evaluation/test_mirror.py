"""Mirrors: every upstream format, whole or not at all, digests that follow the content, all that is missing at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluation.config import BenchmarkConfig
from evaluation.harness.mirror import build_mirror, digest_mirror, missing_data, read_header, read_jsonl


def benchmark(*tasks: str) -> BenchmarkConfig:
    return BenchmarkConfig(name="some", tasks=tasks, metric="acc")


def test_every_upstream_format_gives_the_rows_of_the_hub(raw_benchmarks: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    rows = build_mirror(raw_benchmarks, mirror)
    assert rows["cais/mmlu/anatomy/test.parquet"] == 6
    assert rows["SaylorTwift/bbh/navigate/test.parquet"] == 2
    assert pq.read_table(mirror / "cais/mmlu/anatomy/test.parquet").to_pylist()[0] == {
        "question": "What is 3 plus 4,\nin numbers?",
        "subject": "anatomy",
        "choices": ["3", "4", "7", "62"],
        "answer": 2,
    }
    letters = pq.read_table(mirror / "cais/mmlu/virology/dev.parquet").to_pylist()
    assert (letters[0]["answer"], letters[0]["choices"]) == (0, ["12", "3", "4", "99"])
    (solved, *_) = pq.read_table(mirror / "openai/gsm8k/main/train.parquet").to_pylist()
    assert solved == {"question": "Ann has 3 and buys 4.", "answer": "She has <<3+4=7>>.\n#### 7"}
    problems = pq.read_table(mirror / "openai/openai_humaneval/openai_humaneval/test.parquet").to_pylist()
    assert [p["entry_point"] for p in problems] == ["one", "add"]


def test_the_digest_follows_the_content_and_nothing_else(raw_benchmarks: Path, tmp_path: Path) -> None:
    build_mirror(raw_benchmarks, tmp_path / "a")
    build_mirror(raw_benchmarks, tmp_path / "b")
    assert digest_mirror(tmp_path / "a") == digest_mirror(tmp_path / "b")
    path = raw_benchmarks / "bbh/bbh/navigate.json"
    path.write_text(path.read_text().replace('"False"', '"True"', 1))
    build_mirror(raw_benchmarks, tmp_path / "b")
    assert digest_mirror(tmp_path / "a") != digest_mirror(tmp_path / "b")


def test_a_build_replaces_the_old_mirror_whole(raw_benchmarks: Path, tmp_path: Path) -> None:
    build_mirror(raw_benchmarks, tmp_path / "out" / "mirror")
    shutil.rmtree(raw_benchmarks / "mmlu")
    build_mirror(raw_benchmarks, tmp_path / "out" / "mirror")
    assert not (tmp_path / "out" / "mirror" / "cais").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mirror"]


def test_a_failed_build_leaves_the_old_mirror(raw_benchmarks: Path, tmp_path: Path) -> None:
    build_mirror(raw_benchmarks, tmp_path / "out" / "mirror")
    before = digest_mirror(tmp_path / "out" / "mirror")
    (raw_benchmarks / "gsm8k" / "test.jsonl").write_text('{"question": "no answer"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: no text under answer"):
        build_mirror(raw_benchmarks, tmp_path / "out" / "mirror")
    assert digest_mirror(tmp_path / "out" / "mirror") == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mirror"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mmlu/data/test/anatomy_test.csv", "q,a,b,c,d,E\n", r"anatomy_test\.csv:1: got 6 fields with the answer 'E'"),
        ("mmlu/data/test/anatomy_test.csv", "q,a,b,c,D\n", r"got 5 fields"),
        ("mmlu/data/test/anatomy_test.csv", "", r"anatomy_test\.csv: no rows"),
        ("gsm8k/train.jsonl", '{"question": \n', r"train\.jsonl:1: not JSON"),
        ("bbh/bbh/navigate.json", "[]", r"navigate\.json: no list `examples`"),
        ("bbh/bbh/navigate.json", '{"examples": [{"input": "x"}]}', r"example 0: no text under target"),
        ("humaneval/HumanEval.jsonl", "{}\n", r"is there plain and gzipped"),
    ],
)
def test_broken_rows_are_refused_by_file_and_line(
    raw_benchmarks: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (raw_benchmarks / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build_mirror(raw_benchmarks, tmp_path / "mirror")


def test_a_line_of_upstream_files_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b\x85c", "answer": "1"}, {"question": "d", "answer": "2"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    assert read_jsonl(tmp_path / "test.jsonl", fields=("question", "answer")) == rows


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing found; expected at least one of mmlu/data/test"):
        build_mirror(tmp_path, tmp_path / "mirror")


def test_all_that_a_suite_lacks_is_listed_at_once(mirror: Path) -> None:
    present = benchmark("mmlu_anatomy", "mmlu_virology", "gsm8k", "humaneval", "bbh_cot_fewshot_navigate")
    assert missing_data(mirror, [present]) == []
    assert missing_data(
        mirror, [benchmark("mmlu_astronomy"), benchmark("bbh_cot_fewshot_snarks", "mmlu_anatomie")]
    ) == [
        "SaylorTwift/bbh/snarks/test.parquet",
        "cais/mmlu/astronomy/dev.parquet",
        "cais/mmlu/astronomy/test.parquet",
        "task 'mmlu_anatomie': lm-eval 0.4.13 has no task or group of this name (nearest: mmlu_anatomy, cmmlu_anatomy, mmlu_humanities)",
    ]
    assert len(missing_data(mirror, [benchmark("mmlu")])) == 2 * (57 - 2)
    assert len(missing_data(mirror, [benchmark("bbh_cot_fewshot")])) == 27 - 2
    everything = missing_data(mirror / "nowhere", [present])
    assert "openai/gsm8k/README.md" in everything and len(everything) == 4 + 2 + 1 + 1 + 4


def test_a_mirror_is_built_without_torch() -> None:
    code = "import sys, evaluation.harness.mirror; assert 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_real_rows_are_all_there(real_data: Path, tmp_path: Path) -> None:
    rows = build_mirror(real_data, tmp_path / "mirror")
    assert sum(n for name, n in rows.items() if name.startswith("cais/mmlu/") and "/test" in name) == 14042
    assert rows["openai/gsm8k/main/test.parquet"] == 1319
    assert rows["openai/gsm8k/main/train.parquet"] == 7473
    assert rows["openai/openai_humaneval/openai_humaneval/test.parquet"] == 164
    assert sum(n for name, n in rows.items() if name.startswith("SaylorTwift/bbh/")) == 3437
    assert missing_data(tmp_path / "mirror", [benchmark("mmlu", "gsm8k", "humaneval")]) == []


def write_repository(folder: Path, *, header: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Rows\n")


def test_a_hub_repository_is_taken_as_it_is_and_its_header_says_what_is_there(
    raw_benchmarks: Path, tmp_path: Path
) -> None:
    header = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*"
    rows = b"".join(path.read_bytes() for path in [raw_benchmarks / "gsm8k" / "test.jsonl"])
    files = {"main/train-00000-of-00001.jsonl": rows, "main/test-00000-of-00001.jsonl": rows, "old.py": b""}
    copy = tmp_path / "hub" / "datasets" / "openai" / "gsm8k" / (40 * "a")
    write_repository(copy, header=header, files=files)
    (copy / ".mirror.json").write_text("{}")
    built = build_mirror(tmp_path / "hub", tmp_path / "mirror")
    assert built.keys() == {f"openai/gsm8k/{name}" for name in (*files, "README.md")}, "no manifest"
    assert missing_data(tmp_path / "mirror", [benchmark("gsm8k")]) == []
    (tmp_path / "mirror" / "openai" / "gsm8k" / "main" / "test-00000-of-00001.jsonl").unlink()
    assert missing_data(tmp_path / "mirror", [benchmark("gsm8k")]) == ["openai/gsm8k/main/test.parquet"]
    shutil.copytree(raw_benchmarks / "mmlu", tmp_path / "hub" / "mmlu")
    both = build_mirror(tmp_path / "hub", tmp_path / "mirror")
    assert both["cais/mmlu/anatomy/test.parquet"] == 6 and both["openai/gsm8k/README.md"] == 0
    shutil.copytree(raw_benchmarks / "gsm8k", tmp_path / "hub" / "gsm8k")
    with pytest.raises(ValueError, match="openai/gsm8k is there as raw files and as the hub repository"):
        build_mirror(tmp_path / "hub", tmp_path / "mirror")


@pytest.mark.parametrize(
    ("header", "splits"),
    [
        ("configs:\n- config_name: default\n  data_files: rows.csv", {"train": ["rows.csv"]}),
        (
            "configs:\n- config_name: a\n  default: true\n  data_files: {test: [x.csv, y.csv]}",
            {"test": ["x.csv", "y.csv"]},
        ),
        ("configs:\n- config_name: default\n  data_files:\n  - {split: dev, path: 'd/*.csv'}", {"dev": ["d/*.csv"]}),
        ("license: mit", None),
    ],
)
def test_every_form_of_a_data_set_header_is_understood(
    tmp_path: Path, header: str, splits: dict[str, list[str]] | None
) -> None:
    write_repository(tmp_path, header=header, files={})
    assert read_header(tmp_path).get("default") == splits
