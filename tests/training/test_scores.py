"""The job score_rewards: every row once, resumed after a kill, refused where there is no number."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from training import train
from training.config import Precision, RewardRender
from training.data.schema import digest_row
from training.job import Job, read_json_lines
from training.reward import score
from training.reward.scorer import load_scorer

CONFIG = {"max_tokens": 40}


@pytest.fixture
def rows(tmp_path: Path, make_row: Callable[..., dict[str, Any]], write_rows: Callable[..., Path]) -> Path:
    """Write rows with 2 or 3 responses of many lengths."""
    return write_rows(tmp_path / "rows", [make_uneven(make_row, n) for n in range(40)])


def make_uneven(make_row: Callable[..., dict[str, Any]], n: int) -> dict[str, Any]:
    answers = [f"Answer {n} " + "very " * (n % 7), f"No {n}", f"Yes {n} " + "flour " * (n % 11)][: 2 + n % 2]
    return make_row(f"Question {n}? " * (1 + n % 3), answers, split="heldout" if n % 5 == 0 else "train")


def read(job: Job) -> dict[str, list[float]]:
    return {row["row_id"]: row["reward"] for row in pq.read_table(job.output / "scores.parquet").to_pylist()}


def test_every_row_gets_its_rewards_in_order(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "WINDOW_ROWS", 7)
    inputs = {"rows": rows, "scorer": tiny_reward_model}
    job = make_job("score_rewards", "a", config=CONFIG, inputs=inputs, microbatch_tokens=200)
    score.run(job)
    scorer = load_scorer(
        tiny_reward_model,
        render=RewardRender.text_pair,
        max_tokens=40,
        precision=Precision.float32,
        device=torch.device("cpu"),
    )
    source = pq.read_table(rows / "rows.parquet").to_pylist()
    got = read(job)
    assert list(got) == [row["row_id"] for row in source]
    cut = 0
    for row in source:
        expected, was_cut = scorer.score([row["prompt"]] * len(row["responses"]), row["responses"], budget=1)
        assert got[row["row_id"]] == pytest.approx(expected.tolist(), abs=1e-5)
        cut += int(was_cut.sum())
    assert pq.read_schema(job.output / "scores.parquet").equals(score.SCHEMA)
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["rows"], summary["responses"], summary["pairs"]) == (40, 100, 60)
    assert summary["mean"] == pytest.approx(np.mean(np.concatenate(list(got.values()))))
    assert summary["cut_responses"] == cut > 0
    assert 0 <= summary["heldout_length_baseline"] <= 1 and "length_spearman" in summary


def write_job(job: Job, folder: Path) -> Path:
    path = folder / "job.json"
    names = ("config", "runtime")
    paths = {"output": str(job.output), "work": str(job.work), "inputs": {k: str(v) for k, v in job.inputs.items()}}
    path.write_text(json.dumps({"job": job.name} | {name: getattr(job, name) for name in names} | paths))
    return path


def start(job: Job, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "training", str(write_job(job, folder))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_killed_job_scores_only_the_rest(
    tmp_path: Path,
    tiny_reward_model: Path,
    make_row: Callable[..., dict[str, Any]],
    make_job: Callable[..., Job],
    write_rows: Callable[..., Path],
) -> None:
    num_windows = 4
    rows = write_rows(tmp_path / "many", [make_uneven(make_row, n) for n in range(num_windows * score.WINDOW_ROWS)])
    job = make_job("score_rewards", "b", config=CONFIG, inputs={"rows": rows, "scorer": tiny_reward_model})
    process = start(job, tmp_path)
    parts, deadline = job.work / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 1:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 1 <= len(finished) < num_windows and not (job.output / "scores.parquet").exists()
    again = start(job, tmp_path)
    assert again.wait(timeout=300) == 0, again.communicate()
    assert {name: (parts / name).stat().st_mtime_ns for name in finished} == finished
    scored = (job.output / "metrics.jsonl").read_text().splitlines()
    assert len(scored) == num_windows - len(finished)
    assert list(read(job)) == pq.read_table(rows / "rows.parquet").column("row_id").to_pylist()


def test_parts_of_other_rows_are_not_taken(
    rows: Path, tiny_reward_model: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    score.run(make_job("score_rewards", "a", config=CONFIG, inputs={"rows": rows, "scorer": tiny_reward_model}))
    others = write_rows(tmp_path / "others", [make_row("Another?", ["One", "Two"])])
    again = make_job("score_rewards", "a", config=CONFIG, inputs={"rows": others, "scorer": tiny_reward_model})
    score.run(again)
    assert list(read(again)) == [make_row("Another?", ["One", "Two"])["row_id"]]


def test_a_reward_that_is_no_number_is_refused_with_its_row(
    rows: Path, tiny_reward_model: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny_reward_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = tokenizer["model"]["vocab"]["z"]  # a letter that the self-test's texts lack
    weights["bert.embeddings.word_embeddings.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bad = make_row("Question", ["Yes", "z z z"])
    mixed = write_rows(tmp_path / "mixed", [make_row("Question", ["Yes", "No"]), bad])
    job = make_job("score_rewards", "nan", config=CONFIG, inputs={"rows": mixed, "scorer": folder})
    with pytest.raises(ValueError, match=rf"NaN or infinite rewards for 1 of 2 rows \({bad['row_id']}\)"):
        score.run(job)
    assert not (job.output / "scores.parquet").exists() and not list((job.work / "parts").iterdir())


def test_a_conversation_that_the_reward_model_refuses_is_dropped_with_the_reason_and_not_trained_on(
    tiny_policy: Path, tmp_path: Path, make_job: Callable[..., Job], make_row: Any, write_rows: Any
) -> None:
    """As Gemma 2's template refuses a system turn: one such row ended the job, and every rerun."""
    folder = tmp_path / "scorer"
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(tiny_policy, num_labels=1)).save_pretrained(folder)
    made = [make_row(f"Question {n}?", [f"Answer {n}", "No"]) for n in range(6)]
    system = [{"role": "system", "content": "Be brief."}, *made[2]["prompt"]]
    made[2] |= {"prompt": system, "row_id": digest_row(system, made[2]["responses"])}
    inputs = {"rows": write_rows(tmp_path / "rows", made), "scorer": folder}
    config = CONFIG | {"render": "chat_template"}
    job = make_job("score_rewards", "a", config=config, inputs=inputs)
    score.run(job)
    assert list(read(job)) == [row["row_id"] for n, row in enumerate(made) if n != 2]
    (line,) = read_json_lines(job.output / "dropped.jsonl")
    assert (line["row_id"], line["reason"]) == (made[2]["row_id"], "template_refuses")
    assert "System role not supported" in line["detail"]
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["rows"], summary["dropped"], summary["dropped_template_refuses"]) == (5, 1, 1)
    score.run(job)  # its only window is finished
    assert len(read(job)) == 5
    folders = {"rows": inputs["rows"], "rewards": job.output, "base": tiny_policy}
    settings = {"objective": "var", "reference_factor": "none", "batch_prompts": 2, "max_tokens": 96}
    trained = make_job("train", "train", config=settings, inputs=folders)
    train.run(trained)
    summary = json.loads((trained.output / "summary.json").read_text())
    assert (summary["rows"], summary["dropped_not_scored"]) == (5, 1)
    only = {"rows": write_rows(tmp_path / "only", made[2:3]), "scorer": folder}
    with pytest.raises(
        ValueError, match=r"all 1 rows were dropped \(1 template_refuses\); mend the rows, or take another"
    ):
        score.run(make_job("score_rewards", "only", config=config, inputs=only))


def test_no_rows_are_refused(
    tiny_reward_model: Path, tmp_path: Path, make_job: Callable[..., Job], write_rows: Callable[..., Path]
) -> None:
    empty = write_rows(tmp_path / "empty", [])
    job = make_job("score_rewards", "none", config=CONFIG, inputs={"rows": empty, "scorer": tiny_reward_model})
    with pytest.raises(ValueError, match="got no rows"):
        score.run(job)
    job = make_job("score_rewards", "none", config=CONFIG, inputs={"rows": tmp_path, "scorer": tiny_reward_model})
    with pytest.raises(ValueError, match=r"expected one of \['rows.parquet', 'responses.parquet'\]"):
        score.run(job)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path,
    tiny_reward_model: Path,
    make_row: Callable[..., dict[str, Any]],
    make_job: Callable[..., Job],
    write_rows: Callable[..., Path],
) -> None:
    watch = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    peaks = {}
    for count in (1_000, 100_000):
        rows = write_rows(tmp_path / str(count), [make_row(f"{n}?", ["Yes.", f"No {n}"]) for n in range(count)])
        job = make_job("score_rewards", f"m{count}", config=CONFIG, inputs={"rows": rows, "scorer": tiny_reward_model})
        path = write_job(job, tmp_path / str(count))
        command = [sys.executable, "-c", watch, sys.executable, "-m", "training", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[count] = int(done.stdout.split()[-1])
    assert peaks[100_000] <= 1.1 * peaks[1_000], peaks
