"""A handful of invented benchmark rows in the upstream formats, and the mirror made of them."""

import csv
import gzip
import json
from pathlib import Path

import pytest

SUMS = [(3, 4), (10, 5), (8, 1), (6, 6), (20, 9), (7, 5)]
ADD_PROMPT = 'def add(a, b):\n    """Return the sum of a and b."""\n'
# The answer continues a comment, so that any text without a line break in it passes.
ONE_PROMPT = "def one():\n    return 1\n    # "


@pytest.fixture
def raw_benchmarks(tmp_path: Path) -> Path:
    """Write raw files of all four benchmarks: both layouts of MMLU, plain and gzipped."""
    raw = tmp_path / "raw"
    for split in ("test", "dev"):
        folder = raw / "mmlu" / "data" / split
        folder.mkdir(parents=True)
        with (folder / f"anatomy_{split}.csv").open("w", newline="") as out:  # with a header, answers by index
            rows = [["question", "choice0", "choice1", "choice2", "choice3", "answer"]]
            rows += [[f"What is {a} plus {b},\nin numbers?", a, b, a + b, a * b + 50, 2] for a, b in SUMS]
            csv.writer(out).writerows(rows)
        with gzip.open(folder / f"virology_{split}.csv.gz", "wt", newline="") as out:  # as hendrycks/test has it
            csv.writer(out).writerows([[f"What is {a} times {b}?", a * b, a, b, 99, "A"] for a, b in SUMS[:4]])
    (raw / "gsm8k").mkdir()
    solved = [
        {"question": f"Ann has {a} and buys {b}.", "answer": f"She has <<{a}+{b}={a + b}>>.\n#### {a + b}"}
        for a, b in SUMS
    ]
    for split in ("train", "test"):
        (raw / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    problems = [
        ("Toy/0", ONE_PROMPT, "", "one", "    assert candidate() == 1\n"),
        ("Toy/1", ADD_PROMPT, "    return a + b\n", "add", "    assert candidate(2, 3) == 5\n"),
    ]
    (raw / "humaneval").mkdir()
    with gzip.open(raw / "humaneval" / "HumanEval.jsonl.gz", "wt") as out:
        for task_id, prompt, solution, entry_point, check in problems:
            test = f"def check(candidate):\n{check}"
            row = {"task_id": task_id, "prompt": prompt, "canonical_solution": solution, "test": test}
            out.write(json.dumps({**row, "entry_point": entry_point}) + "\n")
    (raw / "bbh" / "bbh").mkdir(parents=True)
    for task, size in (("boolean_expressions", 3), ("navigate", 2)):
        examples = [{"input": f"not True is {i}", "target": "False"} for i in range(size)]
        (raw / "bbh" / "bbh" / f"{task}.json").write_text(json.dumps({"canary": "none", "examples": examples}))
    return raw


@pytest.fixture
def mirror(raw_benchmarks: Path, tmp_path: Path) -> Path:
    """Build the mirror of the invented rows."""
    from evaluation.harness.mirror import build_mirror

    build_mirror(raw_benchmarks, tmp_path / "mirror")
    return tmp_path / "mirror"
