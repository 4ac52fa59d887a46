"""What counts as the same as lm-eval's command line."""

import json
from pathlib import Path

import pytest

from benchmarks.stock_harness import differences
from evaluation.config import BenchmarkConfig
from evaluation.harness.samples import ANSWER_CHARS

CONFIG = BenchmarkConfig(name="g", tasks=("gsm8k",), metric="exact_match", filter="strict-match")


def write_both(folder: Path, *, ours: str, stock: str) -> list[str]:
    (folder / "ours").mkdir()
    (folder / "stock").mkdir()
    row = {"task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": 1.0, "stderr": None}
    (folder / "ours" / "scores.json").write_text(json.dumps([row]))
    item = {"task": "gsm8k", "doc_id": 0, "choices": None, "answer": ours[:ANSWER_CHARS], "correct": 1.0}
    (folder / "ours" / "samples.jsonl").write_text(json.dumps(item) + "\n")
    scores = {"exact_match,strict-match": 1.0, "exact_match_stderr,strict-match": "N/A"}
    (folder / "stock" / "results_2026.json").write_text(json.dumps({"results": {"gsm8k": scores}}))
    twin = {"doc_id": 0, "filter": "strict-match", "resps": [[stock]], "exact_match": 1.0}
    (folder / "stock" / "samples_gsm8k_2026.jsonl").write_text(json.dumps(twin) + "\n")
    return differences(CONFIG, ours=folder / "ours", stock=folder / "stock")


@pytest.mark.parametrize("length", [10, ANSWER_CHARS, 2 * ANSWER_CHARS])
def test_equal_texts_are_equal_at_any_length(tmp_path: Path, length: int) -> None:
    assert write_both(tmp_path, ours="x" * length, stock="x" * length) == []


def test_unlike_texts_are_told(tmp_path: Path) -> None:
    (found,) = write_both(tmp_path, ours="4", stock="5")
    assert found.startswith("gsm8k document 0: ('4', 1.0), stock ('5', 1.0)")
