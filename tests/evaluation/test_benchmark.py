"""The job `benchmark` as its parent sees it: files, flags, refusals, exit status; and its suites."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation import suites
from evaluation.benchmark import find_flag, run, summarise
from evaluation.config import BenchmarkConfig, SuiteConfig
from evaluation.mirror import build_mirror, missing_data, needed_files
from evaluation.result import read_result
from training.job import EXIT_USER_ERROR, Job

ROOT = Path(__file__).parents[2]
MMLU = BenchmarkConfig(
    name="mmlu_part", tasks=("mmlu_anatomy", "mmlu_virology"), num_fewshot=0, metric="acc", max_length=1024
)
GSM8K = BenchmarkConfig(
    name="gsm8k_part",
    tasks=("gsm8k",),
    num_fewshot=1,
    metric="exact_match",
    filter="strict-match",
    max_gen_toks=6,
    max_length=1024,
)


def write_job(folder: Path, config: BenchmarkConfig, *, model: Path, mirror: Path) -> Path:
    job = {
        "job": "benchmark",
        "config": config.model_dump(mode="json"),
        "runtime": {"device": "cpu", "threads": 1},
        "inputs": {"model": str(model), "mirror": str(mirror)},
        "output": str(folder / "output"),
        "work": str(folder / "work"),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def start(job_file: Path, *, lifeline: int | None = None) -> "subprocess.Popen[str]":
    """Start the child as the parent does: a safe path, another working directory, an environment of a few names."""
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    arguments = [str(job_file)] if lifeline is None else [str(job_file), str(lifeline)]
    return subprocess.Popen(
        [sys.executable, "-m", "evaluation", *arguments],
        cwd=job_file.parent,
        env=environment,
        pass_fds=() if lifeline is None else (lifeline,),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_child_leaves_the_files_that_the_gate_reads(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    child = start(write_job(tmp_path, MMLU, model=tiny_policy, mirror=mirror))
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    result = read_result(tmp_path / "output")
    assert (result.benchmark, len(result.items)) == ("mmlu_part", 10)
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    (deciding,) = (row for row in result.scores if row.decides)
    assert (summary["value"], summary["items"]) == (deciding.value, 10)
    anatomy, virology = (row.value for row in result.scores if not row.decides)
    assert summary["macro_value"] == pytest.approx((anatomy + virology) / 2)
    assert all(value is None or isinstance(value, str | int | float) for value in summary.values()), "it is flat"


def test_a_child_whose_parent_dies_stops_and_a_rerun_finishes(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    job_file = write_job(tmp_path, MMLU, model=tiny_policy, mirror=mirror)
    child = start(job_file, lifeline=reader)
    os.close(reader)
    os.close(writer)  # as the parent's death does
    _, errors = child.communicate(timeout=300)
    assert child.returncode == -signal.SIGKILL, "an orphan ends itself and its group once it has saved"
    assert "benchmark: stopped on request" in errors
    assert not (tmp_path / "output" / "scores.json").exists()
    run(Job.read(job_file))
    assert len(read_result(tmp_path / "output").items) == 10


def test_all_missing_data_is_named_before_anything_is_loaded(tmp_path: Path, mirror: Path) -> None:
    shutil.rmtree(mirror / "cais" / "mmlu" / "virology")
    (mirror / "cais" / "mmlu" / "anatomy" / "dev.parquet").unlink()
    child = start(write_job(tmp_path, MMLU, model=tmp_path / "no such model", mirror=mirror))
    _, errors = child.communicate(timeout=300)
    assert child.returncode == EXIT_USER_ERROR, errors
    message = json.loads((tmp_path / "work" / "error.json").read_text())["message"]
    for name in ("anatomy/dev", "virology/dev", "virology/test"):
        assert f"cais/mmlu/{name}.parquet" in message
    assert "lacks 3 files" in message


def test_a_zero_score_is_flagged_with_samples(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    job = Job.read(write_job(tmp_path, GSM8K, model=tiny_policy, mirror=mirror))
    run(job)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["flag"] == "zero: none of 6 answers is right"
    assert summary["unextracted_share"] == 1.0  # a random model never writes "####"
    assert "Ann has 3 and buys 4" in summary["flag_sample_1"]
    assert "flag_sample_5" in summary and "flag_sample_6" not in summary
    assert all(value is None or isinstance(value, str | int | float) for value in summary.values()), "it is flat"


def sample(correct: float, *, choices: int | None = 4, **fields: Any) -> dict[str, Any]:
    return {"task": "t", "doc_id": 0, "correct": correct, "choices": choices, "prompt": "p", "target": "t"} | {
        "answer": "a",
        "extracted": True,
        **fields,
    }


@pytest.mark.parametrize(
    ("value", "stderr", "choices", "flag"),
    [
        (0.0, 0.0, None, "zero: none of 2 answers is right"),
        (0.0, 0.0, 4, "zero: none of 2 answers is right"),
        (0.34, 0.05, 4, "chance: 0.3400 is not above guessing, 0.2500, by 2 standard errors"),
        (0.36, 0.05, 4, None),
        (0.10, 0.01, None, None),
        (0.60, 0.06, 2, "chance: 0.6000 is not above guessing, 0.5000, by 2 standard errors"),
        (1.0, None, 2, None),
    ],
)
def test_the_flag(value: float, stderr: float | None, choices: int | None, flag: str | None) -> None:
    samples = [sample(0.0, choices=choices), sample(0.0, choices=choices)]
    assert find_flag({"value": value, "stderr": stderr}, samples) == flag


def test_the_summary_counts_what_could_not_be_used(tmp_path: Path) -> None:
    samples = [sample(0.0, choices=None, answer=" ", extracted=False), sample(0.0, choices=None, extracted=False)]
    samples += [sample(1.0, choices=None), sample(1.0, choices=None, task="u")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (tmp_path / "profile.json").write_text(json.dumps({"truncated_prompts": 3}))
    rows = [{"decides": True, "value": 0.5, "stderr": 0.3, "n": 4}, {"decides": False, "value": 0.75}]
    summary = summarise(rows, output=tmp_path, name="b")
    assert (summary["empty_answer_share"], summary["unextracted_share"]) == (0.25, 0.5)
    assert (summary["macro_value"], summary["truncated_prompts"]) == (pytest.approx(2 / 3), 3)
    assert summary["flag"] is None and "flag_sample_1" not in summary


@pytest.mark.parametrize("suite", [suites.paper(), suites.demo(), suites.smoke()], ids=["paper", "demo", "smoke"])
def test_a_part_never_carries_the_whole_benchmark_s_name(suite: SuiteConfig) -> None:
    names = [b.name for b in suite.benchmarks]
    assert len(set(names)) == len(names)
    whole = {"mmlu": ("mmlu",), "gsm8k": ("gsm8k",), "humaneval": ("humaneval",), "bbh": ("bbh_cot_fewshot",)}
    for b in suite.benchmarks:
        assert all(needed_files(task) for task in b.tasks)
        if b.name in whole:
            assert (b.tasks, b.limit) == (whole[b.name], None)
        else:
            assert b.name.endswith("_part")


def test_the_shipped_files_serve_the_demo_and_the_smoke_suite(tmp_path: Path) -> None:
    build_mirror(ROOT / "flows" / "demo" / "benchmarks", tmp_path / "mirror")
    assert missing_data(tmp_path / "mirror", [*suites.demo().benchmarks, *suites.smoke().benchmarks]) == []
