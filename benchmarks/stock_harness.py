"""lm-eval's own command line, run offline on a mirror with a benchmark's settings: what our numbers and times are held to."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.config import BenchmarkConfig
from evaluation.harness.samples import ANSWER_CHARS
from training.job import read_json_lines

ANNOUNCED = ("Running loglikelihood requests", "Running generate_until requests")  # lm-eval's, where start-up ends
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


@dataclass(frozen=True)
class Timed:
    """Wall seconds of a command: to where lm-eval says that it sends requests, and from there to its end."""

    startup_seconds: float
    work_seconds: float


def add_code_eval(mirror: Path) -> None:
    """Put the metric that HumanEval needs into a mirror."""
    (mirror / "code_eval").mkdir(exist_ok=True)
    (mirror / "code_eval" / "code_eval.py").write_text(CODE_EVAL)


def stock_command(config: BenchmarkConfig, *, policy: Path, output: Path, batch_size: int) -> list[str]:
    """Return the command with a benchmark's settings."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--batch_size",
        str(batch_size),
        "--device",
        "cpu",
    ]
    command += ["--model_args", f"pretrained={policy},dtype={config.precision.value},max_length={config.max_length}"]
    command += ["--tasks", ",".join(config.tasks), "--output_path", str(output), "--log_samples"]
    command += ["--seed", f"0,1234,1234,{config.seed}", "--confirm_run_unsafe_code"]
    if config.limit is not None:
        command += ["--limit", str(config.limit)]
    if config.num_fewshot is not None:
        command += ["--num_fewshot", str(config.num_fewshot)]
    if config.chat_template:
        command += ["--apply_chat_template"]  # which makes worked examples turns of the conversation
    if config.system_prompt is not None:
        command += ["--system_instruction", config.system_prompt]
    if config.max_gen_toks is not None:
        command += ["--gen_kwargs", f"max_gen_toks={config.max_gen_toks}"]
    return command


def offline_environment(folder: Path, *, threads: int) -> dict[str, str]:
    """Return the environment of either side: no hub, its caches in `folder`, so many threads."""
    return {
        "PATH": os.defpath,
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_ALLOW_CODE_EVAL": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def run_timed(command: list[str], *, cwd: Path, environment: dict[str, str]) -> Timed:
    """Run a command that logs what lm-eval logs. RuntimeError with the end of its log where it fails."""
    started = time.monotonic()
    announced = None
    lines = []
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            lines.append(line)
            if announced is None and any(text in line for text in ANNOUNCED):
                announced = time.monotonic()
    ended = time.monotonic()
    if child.returncode or announced is None:
        raise RuntimeError(f"{command} ended with {child.returncode}:\n{''.join(lines)[-4000:]}")
    return Timed(announced - started, ended - announced)


def read_stock(output: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return (results by task or group, samples by task) of a finished command."""
    (results,) = output.rglob("results_*.json")
    samples = {}
    for path in output.rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_").rpartition("_")[0]
        samples[name] = read_json_lines(path)
    return json.loads(results.read_text())["results"], samples


def differences(config: BenchmarkConfig, *, ours: Path, stock: Path) -> list[str]:
    """Return what differs between our result folder and the command's: any score, any item's verdict, any text."""
    results, samples = read_stock(stock)
    found = []
    for row in json.loads((ours / "scores.json").read_text()):
        group = row["task"] == config.name and len(config.tasks) == 1
        theirs = results.get(config.tasks[0] if group else row["task"])
        if theirs is None:  # the command line pools groups alone, not any list of tasks
            continue
        for name, key in (("value", row["metric"]), ("stderr", f"{row['metric']}_stderr")):
            stock_value = theirs[f"{key},{row['filter']}"]
            if row[name] != (None if stock_value == "N/A" else stock_value):
                found.append(f"{row['task']} {row['metric']},{row['filter']} {name}: {row[name]}, stock {stock_value}")
    items = read_json_lines(ours / "samples.jsonl")
    twins = {(task, s["doc_id"]): s for task, some in samples.items() for s in some if s["filter"] == config.filter}
    if len(items) != len(twins):
        found.append(f"{len(items)} items, stock {len(twins)}")
    for item in items:
        twin = twins[item["task"], item["doc_id"]]
        answer = item["answer"], item["correct"]
        if item["choices"] is None:
            stock_answer = twin["resps"][0][0][:ANSWER_CHARS], float(twin[config.metric])
        else:
            logps = [float(response[0][0]) for response in twin["resps"]]
            chosen = list(twin["arguments"].values())[logps.index(max(logps))]["arg_1"].strip()
            stock_answer = chosen, float(twin[config.metric])
        if answer != stock_answer:
            found.append(f"{item['task']} document {item['doc_id']}: {answer}, stock {stock_answer}")
    return found
