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
import torch
from transformers import LlamaForCausalLM

from evaluation import suites
from evaluation.config import AlignmentConfig, BenchmarkConfig, SuiteConfig
from evaluation.harness.benchmark import find_flag, run, summarise
from evaluation.harness.mirror import build_mirror, missing_data, needed_data
from evaluation.harness.result import read_result
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
    assert "lacks 3 files or tasks" in message


def test_a_zero_score_is_flagged_with_samples(tiny_policy: Path, mirror: Path, tmp_path: Path) -> None:
    job = Job.read(write_job(tmp_path, GSM8K, model=tiny_policy, mirror=mirror))
    run(job)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["flag"].split("; ")[0] == "zero: none of 6 answers is right"
    assert "format: in 100% of the answers strict-match found nothing" in summary["flag"]
    assert summary["unextracted_share"] == 1.0  # a random model never writes "####"
    assert summary["cut_share"] > 0 and "were ended by the token limit" in summary["flag"]
    (deciding,) = (row for row in read_result(job.output).scores if row.decides)
    assert deciding.flag == summary["flag"]
    assert "Ann has 3 and buys 4" in summary["flag_sample_1"]
    assert "flag_sample_5" in summary and "flag_sample_6" not in summary
    assert all(value is None or isinstance(value, str | int | float) for value in summary.values()), "it is flat"


@pytest.mark.parametrize("config", [GSM8K, MMLU], ids=["generation", "choices"])
def test_a_model_that_says_nothing_is_flagged(
    tiny_policy: Path, mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(tiny_policy, silent)
    model = LlamaForCausalLM.from_pretrained(silent)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are equal, and greedy search takes id 0, which is no text
    model.save_pretrained(silent)
    job = Job.read(write_job(tmp_path, config, model=silent, mirror=mirror))
    run(job)
    flags = json.loads((job.output / "summary.json").read_text())["flag"].split("; ")
    if config is GSM8K:
        assert flags[:2] == ["zero: none of 6 answers is right", "empty: 100% of the answers have no text"]
    else:
        assert "ties: in 100% of the items the model tells no choice from another, and the first counts" in flags


def sample(correct: float, *, choices: int | None = 4, **fields: Any) -> dict[str, Any]:
    return {"task": "t", "doc_id": 0, "correct": correct, "choices": choices, "prompt": "p", "target": "t"} | {
        "answer": "a",
        "extracted": True,
        "extracted_by_any": True,
        "cut": False,
        "tied": False,
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
    samples = [
        sample(0.0, choices=None, answer=" ", extracted=False, extracted_by_any=False),
        sample(0.0, choices=None, extracted=False),
    ]
    samples += [sample(1.0, choices=None), sample(1.0, choices=None, task="u")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (tmp_path / "profile.json").write_text(json.dumps({"truncated_prompts": 3, "bos": {"count": 1}}))
    strict = {"task": "t", "metric": "exact_match", "filter": "strict-match", "decides": True}
    flexible = strict | {"filter": "flexible-extract", "decides": False, "value": 0.75}
    rows = [strict | {"value": 0.5, "stderr": 0.3, "n": 4}, flexible]
    summary = summarise(rows, output=tmp_path, name="b")
    assert (summary["empty_answer_share"], summary["unextracted_share"]) == (0.25, 0.5)
    assert summary["unextracted_by_all_share"] == 0.25
    assert (summary["macro_value"], summary["truncated_prompts"]) == (pytest.approx(2 / 3), 3)
    assert summary["value_flexible_extract"] == 0.75 and summary["bos_count"] == 1
    assert summary["flag"].split("; ") == [
        "empty: 25% of the answers have no text",
        "format: in 50% of the answers strict-match found nothing, in 25% no filter did",
        "prompts: 3 did not fit and were cut from the left (max_length)",
        "filters: strict-match says 0.5000, flexible-extract says 0.7500 of the same answers",
    ]


def test_a_sound_result_has_no_flag(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(1.0, choices=None)) + "\n")
    (tmp_path / "profile.json").write_text(json.dumps({"truncated_prompts": 0, "bos": {"count": 0}}))
    row = {"task": "t", "metric": "m", "filter": "none", "decides": True, "value": 1.0, "stderr": None, "n": 1}
    summary = summarise([row], output=tmp_path, name="b")
    assert summary["flag"] is None and "flag_sample_1" not in summary


def test_answers_that_the_limit_ended_are_flagged(tmp_path: Path) -> None:
    lines = [sample(1.0, choices=None, cut=cut) for cut in (True, False, False)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "profile.json").write_text(json.dumps({"truncated_prompts": 0, "bos": {"count": 0}}))
    row = {"task": "t", "metric": "m", "filter": "none", "decides": True, "value": 1.0, "stderr": 0.0, "n": 3}
    summary = summarise([row], output=tmp_path, name="b")
    assert summary["cut_share"] == pytest.approx(1 / 3)
    assert summary["flag"].startswith("limit: 33% of the answers were ended by the token limit")


def test_programs_that_the_clock_ended_are_flagged(tmp_path: Path) -> None:
    endings = ["passed"] * 9 + ["timeout"]
    lines = [sample(float(e == "passed"), choices=None, ending=e, reason=e) for e in endings]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "profile.json").write_text(json.dumps({"truncated_prompts": 0, "bos": {"count": 0}}))
    row = {"task": "t", "metric": "m", "filter": "none", "decides": True, "value": 0.9, "stderr": 0.1, "n": 10}
    summary = summarise([row], output=tmp_path, name="b")
    assert summary["timeout_share"] == pytest.approx(0.1)
    assert summary["flag"].startswith("time: 10% of the programs were still running at their limit")


@pytest.mark.parametrize("suite", [make() for make in suites.SUITES.values()], ids=list(suites.SUITES))
def test_a_part_never_carries_the_whole_benchmark_s_name(suite: SuiteConfig) -> None:
    names = [b.name for b in suite.benchmarks]
    assert len(set(names)) == len(names)
    whole: dict[str, tuple[tuple[str, ...], ...]] = {
        "mmlu": (("mmlu",),),
        "gsm8k": (("gsm8k",),),
        "humaneval": (("humaneval",), ("humaneval_instruct",)),
        "bbh": (("bbh_cot_fewshot",),),
    }
    for b in suite.benchmarks:
        assert all(needed_data(task) for task in b.tasks)
        if b.name in whole:
            assert b.tasks in whole[b.name] and b.limit is None
        else:
            assert b.name.endswith("_part")


def test_the_shipped_files_serve_the_demo_and_the_smoke_suite(tmp_path: Path) -> None:
    build_mirror(ROOT / "flows" / "demo" / "benchmarks", tmp_path / "mirror")
    assert missing_data(tmp_path / "mirror", [*suites.demo().benchmarks, *suites.smoke().benchmarks]) == []


def test_the_mean_of_a_profile_is_unweighted() -> None:
    # HumanEval 113 of 164 and the paper's other three figures would have this mean
    values = {"mmlu": 0.6, "gsm8k": 0.5, "humaneval": 113 / 164, "bbh": 0.3}
    assert suites.mean_score(suites.paper(), values) == ("paper", pytest.approx((1.4 + 113 / 164) / 4))
    assert suites.find_profile(suites.standard()) == "standard"
    assert suites.find_profile(suites.paper_chat()) == "paper_chat"


def test_a_part_has_neither_the_name_nor_the_mean_of_the_whole() -> None:
    part = suites.limit_suite(suites.paper(), 8)
    assert [b.name for b in part.benchmarks] == ["mmlu_part", "gsm8k_part", "humaneval_part", "bbh_part"]
    assert {b.limit for b in part.benchmarks} == {8}
    fewer = SuiteConfig(benchmarks=suites.paper().benchmarks[:3])
    seeded = SuiteConfig(benchmarks=(*fewer.benchmarks, suites.paper().benchmarks[3].model_copy(update={"seed": 1})))
    for suite in (part, fewer, seeded, suites.demo(), suites.smoke()):
        assert suites.find_profile(suite) is None
        assert suites.mean_score(suite, {b.name: 0.5 for b in suite.benchmarks}) is None
    assert [b.limit for b in suites.limit_suite(suites.demo(), 5).benchmarks] == [5, 5, 5, 3]


def test_evaluations_by_reward_model_stand_beside_a_profile() -> None:
    suite = suites.paper().model_copy(update={"alignment": suites.alignment().alignment})
    assert suites.find_profile(suite) == "paper"
    assert [each.title for each in suite.alignment.prompt_sets] == ["hha_helpful", "hha_harmless", "offsetbias"]
    part = suites.limit_suite(suite, 8)
    assert part.alignment.prompt_sets[0].title == "hha_helpful_part"
    assert [each.limit for each in suites.limit_suite(suites.reward_bias(), 8).alignment.pair_sets] == [8, 8]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_sets": [{"name": "hha_helpful"}] * 2}, "hha_helpful is there twice"),
        ({"answers": {"split": "train"}}, "got split train and limit None, expected heldout and none"),
        ({"answers": {"limit": 4}}, "got split heldout and limit 4, expected heldout and none"),
        ({"pair_sets": [{"name": "offsetbias"}]}, "'evalbiasbench' or 'llmbar'"),
    ],
)
def test_sets_that_mean_nothing_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AlignmentConfig.model_validate(fields)


def test_a_limited_benchmark_cannot_take_the_whole_one_s_name() -> None:
    with pytest.raises(ValueError, match=r"benchmark mmlu: has the item limit 5, so it is no mmlu; name it mmlu_part"):
        BenchmarkConfig(name="mmlu", tasks=("mmlu",), num_fewshot=0, metric="acc", limit=5)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("mmlu", ("mmlu_anatomy",)), ("bbh", ("bbh_cot_fewshot_navigate",)), ("gsm8k", ("gsm8k", "mmlu"))],
)
def test_some_tasks_of_a_benchmark_cannot_take_its_name(name: str, tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"has the tasks {', '.join(tasks)} and not one of .*; name it {name}_part"):
        BenchmarkConfig(name=name, tasks=tasks, metric="acc")
    assert BenchmarkConfig(name=f"{name}_part", tasks=tasks, metric="acc")


def test_a_limited_benchmark_of_any_name_is_a_part() -> None:
    with pytest.raises(ValueError, match=r"benchmark arc: has the item limit 5, so it is no arc; name it arc_part"):
        BenchmarkConfig(name="arc", tasks=("arc_easy",), metric="acc", limit=5)


def test_a_suite_names_each_benchmark_once() -> None:
    with pytest.raises(ValueError, match=r"suite: mmlu_part is there twice"):
        SuiteConfig(benchmarks=(MMLU, MMLU.model_copy(update={"seed": 5})))


def test_another_version_of_the_harness_is_another_benchmark() -> None:
    with pytest.raises(ValueError, match=r"harness: got 0\.0\.1, installed is lm-eval .*; leave the field out"):
        BenchmarkConfig.model_validate(MMLU.model_dump() | {"harness": "0.0.1"})


def test_a_profile_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"profile 'papper': no such profile; expected one of demo, paper"):
        suites.read_suite("papper")
