"""The numbers are those of lm-eval's own command line, to the last digit, on real rows and per item."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from evaluation.config import BenchmarkConfig
from evaluation.harness import evaluate
from evaluation.mirror import build_mirror
from training.config import Device, Runtime

pytestmark = pytest.mark.slow

LIMIT = 8
CAP = 12
# lm-eval fetches this metric from the hub; for its command line to run offline, a plain one lies in the mirror.
CODE_EVAL = """
import subprocess
import sys
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, k=(1,)):
        passed = [
            subprocess.run([sys.executable, "-c", p[0] + "\\n" + t], capture_output=True, timeout=30).returncode == 0
            for p, t in zip(predictions, references)
        ]
        return {"pass@1": sum(passed) / len(passed)}, {}
"""


@pytest.fixture(scope="module")
def real_mirror(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mirror = tmp_path_factory.mktemp("real") / "mirror"
    build_mirror(real_data, mirror)
    (mirror / "code_eval").mkdir()
    (mirror / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    return mirror


def run_cli(
    config: BenchmarkConfig, *, policy: Path, mirror: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (results by task or group, samples by task) of `python -m lm_eval` with the same settings."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--batch_size", "8", "--device", "cpu"]
    command += ["--model_args", f"pretrained={policy},dtype=float32,max_length={config.max_length}"]
    command += ["--tasks", ",".join(config.tasks), "--output_path", str(folder / "cli"), "--log_samples"]
    command += ["--seed", f"0,1234,1234,{config.seed}", "--confirm_run_unsafe_code"]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    if config.num_fewshot is not None:
        command += ["--num_fewshot", str(config.num_fewshot)]
    if config.max_gen_toks is not None:
        command += ["--gen_kwargs", f"max_gen_toks={config.max_gen_toks}"]
    environment = {"PATH": os.defpath, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_ALLOW_CODE_EVAL": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=mirror, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (folder / "cli").rglob("results_*.json")
    samples = {}
    for path in (folder / "cli").rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rpartition("_")[0]
        samples[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


@pytest.mark.parametrize(
    "config",
    [
        BenchmarkConfig(name="mmlu", tasks=("mmlu",), num_fewshot=0, metric="acc", limit=2, max_length=1024),
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
    results, samples = run_cli(config, policy=tiny_policy, mirror=real_mirror, folder=tmp_path)
    compared = 0
    for row in rows:
        theirs = results.get(row["task"])
        if theirs is None:  # the command line pools groups alone, not any list of tasks
            assert row["task"] == config.name and len(config.tasks) > 1
            continue
        stderr = theirs[f"{row['metric']}_stderr,{row['filter']}"]
        assert row["value"] == theirs[f"{row['metric']},{row['filter']}"]
        assert row["stderr"] == (None if stderr == "N/A" else stderr)
        compared += 1
    assert compared >= (58 if config.tasks == ("mmlu",) else 1)
    ours = [json.loads(line) for line in (tmp_path / "output" / "samples.jsonl").read_text().splitlines()]
    assert len(ours) == sum(len([s for s in items if s["filter"] == config.filter]) for items in samples.values())
    for item in ours:
        (twin,) = (s for s in samples[item["task"]] if s["doc_id"] == item["doc_id"] and s["filter"] == config.filter)
        assert item["correct"] == float(twin[config.metric])
        if item["choices"] is None:
            assert item["answer"] == twin["resps"][0][0]
        else:
            logps = [float(response[0][0]) for response in twin["resps"]]
            assert item["answer"] == "ABCD"[logps.index(max(logps))]
