"""The numbers are those of lm-eval's own command line, to the last digit, on real rows and per item."""

import threading
from pathlib import Path

import pytest

from benchmarks.stock_harness import (
    add_code_eval,
    differences,
    offline_environment,
    read_stock,
    run_timed,
    stock_command,
)
from evaluation.config import BenchmarkConfig
from evaluation.harness import evaluate
from evaluation.mirror import build_mirror
from training.config import Device, Runtime
from training.job import write_json

pytestmark = pytest.mark.slow

LIMIT = 8
CAP = 12


@pytest.fixture(scope="module")
def real_mirror(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mirror = tmp_path_factory.mktemp("real") / "mirror"
    build_mirror(real_data, mirror)
    add_code_eval(mirror)
    return mirror


@pytest.mark.parametrize(
    "config",
    [
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
    ],
    ids=["mmlu whole", "mmlu 2-shot", "gsm8k", "bbh", "humaneval"],
)
def test_scores_and_items_equal_the_command_line(
    tiny_policy: Path, real_mirror: Path, tmp_path: Path, config: BenchmarkConfig
) -> None:
    (tmp_path / "output").mkdir()
    rows = evaluate(
        tiny_policy,
        real_mirror,
        config,
        runtime=Runtime(device=Device.cpu, microbatch_tokens=8 * 256),
        output=tmp_path / "output",
        work=tmp_path / "work",
        stop=threading.Event(),
    )
    write_json(tmp_path / "output" / "scores.json", rows)
    command = stock_command(config, policy=tiny_policy, output=tmp_path / "stock", batch_size=8)
    run_timed(command, cwd=real_mirror, environment=offline_environment(tmp_path, threads=1))
    assert differences(config, ours=tmp_path / "output", stock=tmp_path / "stock") == []
    compared = [row for row in rows if row["task"] in read_stock(tmp_path / "stock")[0]]
    assert len(compared) >= (57 if config.tasks == ("mmlu",) else 1)
