"""Any stock task of lm-eval by its name: what it reads, why some are refused, and real runs on tiny data sets in the hub's format."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.config import BenchmarkConfig
from evaluation.harness.mirror import build_mirror, missing_data, needed_data
from evaluation.harness.result import read_result
from evaluation.harness.run import evaluate
from evaluation.harness.stock import find_folders, read_tasks
from training.config import Device, Runtime
from training.job import write_json

COMMIT = 40 * "a"
QUESTIONS = (
    "What is frozen water called?",
    "Which planet do people live on?",
    "What do bees make?",
    "What falls from clouds?",
)
ARC = {
    "id": list("abcd"),
    "question": list(QUESTIONS),
    "choices": [{"text": ["ice", "steam", "sand"], "label": ["A", "B", "C"]}] * 4,
    "answerKey": ["A", "A", "B", "C"],
}
TRIVIA = {"question": list(QUESTIONS), "answer": [{"aliases": ["Ice", "ice"], "value": "Ice"}] * 4}
WINO = {
    "sentence": ["The cup did not fit the box because the _ was too large."] * 4,
    "option1": ["cup"] * 4,
    "option2": ["box"] * 4,
    "answer": list("1121"),
}
LAMBADA = {"text": [f"He said it {i} times and then he said it again" for i in range(4)]}


def add(raw: Path, repository: str, config: str, **splits: dict[str, list[Any]]) -> None:
    """Write a data set as the hub has it: a README whose header names a Parquet file for each split of a configuration."""
    folder = raw / "datasets" / repository / COMMIT
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, columns in splits.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / config / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    raw = tmp_path / "hub"
    add(raw, "allenai/ai2_arc", "ARC-Easy", train=ARC, validation=ARC, test=ARC)
    add(raw, "mandarjoshi/trivia_qa", "rc.nocontext", train=TRIVIA, validation=TRIVIA)
    add(raw, "allenai/winogrande", "winogrande_xl", train=WINO, validation=WINO)
    add(raw, "EleutherAI/lambada_openai", "default", test=LAMBADA)
    build_mirror(raw, tmp_path / "mirror")
    return tmp_path / "mirror"


def run(
    policy: Path, mirror: Path, config: BenchmarkConfig, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    output = folder / "output"
    output.mkdir(parents=True)
    rows = evaluate(
        policy,
        mirror,
        config,
        runtime=Runtime(device=Device.cpu),
        output=output,
        work=folder / "work",
        stop=threading.Event(),
    )
    write_json(output / "scores.json", rows)
    assert read_result(output).questions
    return rows, [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "asked", "choices"),
    [
        ({"name": "arc_easy", "tasks": ("arc_easy",), "metric": "acc_norm", "num_fewshot": 1}, QUESTIONS[0], 3),
        (
            {
                "name": "trivia",
                "tasks": ("triviaqa",),
                "metric": "exact_match",
                "filter": "remove_whitespace",
                "max_gen_toks": 4,
            },
            QUESTIONS[0],
            None,
        ),
        ({"name": "wino", "tasks": ("winogrande",), "metric": "acc"}, WINO["sentence"][0], 2),
        (
            {"name": "lambada", "tasks": ("lambada_openai",), "metric": "acc"},
            LAMBADA["text"][0].removesuffix(" again"),
            None,
        ),
        ({"name": "both", "tasks": ("arc_easy", "winogrande"), "metric": "acc"}, QUESTIONS[0], 3),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_stock_task_runs_offline_by_its_name(
    tiny_policy: Path, mirror: Path, tmp_path: Path, settings: dict[str, Any], asked: str, choices: int | None
) -> None:
    config = BenchmarkConfig.model_validate(settings | {"max_length": 1024})
    assert missing_data(mirror, [config]) == []
    rows, samples = run(tiny_policy, mirror, config, tmp_path / "run")
    (row,) = (row for row in rows if row["decides"])
    assert row["n"] == len(samples) == 4 * len(config.tasks)
    assert row["value"] == pytest.approx(sum(sample["correct"] for sample in samples) / len(samples))
    assert asked in samples[0]["question"] and samples[0]["choices"] == choices
    assert samples[0]["question"].count("?") <= 1, "one question, and no worked example"


def test_what_a_task_needs_and_lacks_is_told_by_its_own_file(mirror: Path) -> None:
    assert {need.file for need in needed_data("arc_challenge")} == {
        f"allenai/ai2_arc/ARC-Challenge/{split}.parquet" for split in ("train", "validation", "test")
    }
    assert {need.repository for need in needed_data("wmdp")} == {"cais/wmdp"}  # a group
    challenge = BenchmarkConfig(name="arc", tasks=("arc_challenge", "hellaswag", "arc_esy", "mbpp"), metric="acc")
    missing = missing_data(mirror, [challenge])
    assert missing[:5] == [
        "Rowan/hellaswag/README.md", "Rowan/hellaswag/default/train.parquet", "Rowan/hellaswag/default/validation.parquet",
        "allenai/ai2_arc/ARC-Challenge/test.parquet", "allenai/ai2_arc/ARC-Challenge/train.parquet",
    ]  # fmt: skip
    assert "task 'arc_esy': lm-eval 0.4.13 has no task or group of this name (nearest: arc_easy" in missing[-2]
    assert missing[-1].startswith("task 'mbpp' cannot be run here: it runs code outside of our sandbox")
    assert [folder.name for folder in find_folders(("arc_easy", "wmdp"))] == ["arc", "wmdp"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mbpp", "runs code outside of our sandbox, in which only humaneval and humaneval_instruct run"),
        ("cruxeval_input", "runs code outside"),  # it says nothing of it in its file
        ("humaneval_plus", "runs code outside"),
        ("wikitext", "measures perplexity"),
        ("squadv2", "made by code of its own"),
    ],
)
def test_a_task_that_cannot_be_run_here_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"task '{name}' cannot be run here: it .*{reason}"):
        needed_data(name)


@pytest.mark.parametrize(
    "name", ["arc_easy", "hellaswag", "triviaqa", "truthfulqa_mc2", "ifeval", "minerva_math_algebra"]
)
def test_a_task_without_code_of_that_kind_is_not_refused(name: str) -> None:
    (task,) = read_tasks(name)
    assert task.refusal() is None and task.needs()


def test_a_metric_that_is_no_mean_over_items_is_refused_before_anything_is_answered(
    tiny_policy: Path, mirror: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(name="lambada", tasks=("lambada_openai",), metric="perplexity", max_length=1024)
    with pytest.raises(ValueError, match="has a perplexity that is no mean over items, expected one of acc"):
        run(tiny_policy, mirror, config, tmp_path / "run")
