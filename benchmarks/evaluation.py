"""How long an evaluation takes against lm-eval's own command line, and whether its numbers are the same.

`python -m benchmarks.evaluation --json [--data FOLDER] [--only NAME] [--repeats N] [--limit N]`, where FOLDER holds the benchmarks' upstream
files (evaluation/harness/mirror.py). SmolLM2-135M in float32, the same rows, batch size and answer cap, a process each, stock and ours
in turn. Start-up is what comes before lm-eval says that it sends requests, and is reported apart; ours begins with the same words.

Keys: `time_ratio` (median seconds of ours over those of stock, by benchmark), `identical` (every score, every item's verdict and
every text as far as a sample keeps it, by benchmark), `seconds`, `startup_seconds`.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS_VARIABLE, find_rows
from benchmarks.stock_harness import Timed, add_code_eval, differences, offline_environment, run_timed, stock_command
from evaluation.config import BenchmarkConfig
from evaluation.harness.benchmark import run
from evaluation.harness.mirror import build_mirror
from infra.models import fetch_embedded
from infra.settings import read_settings
from training.job import Job

BATCH_SIZE = 8
SUBJECTS = ("mmlu_abstract_algebra", "mmlu_high_school_geography", "mmlu_miscellaneous", "mmlu_professional_medicine")
BBH = ("bbh_cot_fewshot_date_understanding", "bbh_cot_fewshot_hyperbaton", "bbh_cot_fewshot_navigate")
MMLU = BenchmarkConfig(name="mmlu_part", tasks=SUBJECTS, num_fewshot=0, metric="acc", limit=48)
CASES = {
    "mmlu": MMLU,
    "mmlu_5shot": MMLU.model_copy(update={"num_fewshot": 5, "limit": 24}),
    "gsm8k": BenchmarkConfig(
        name="gsm8k_part",
        tasks=("gsm8k",),
        num_fewshot=4,
        metric="exact_match",
        filter="strict-match",
        max_gen_toks=256,
        limit=16,
    ),
    "humaneval": BenchmarkConfig(
        name="humaneval_part",
        tasks=("humaneval",),
        num_fewshot=0,
        metric="pass@1",
        filter="create_test",
        limit=16,
        sandbox_seconds=30.0,
    ),
    "bbh": BenchmarkConfig(
        name="bbh_part", tasks=BBH, metric="exact_match", filter="get-answer", max_gen_toks=150, limit=8
    ),
}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=find_rows(),
        help=f"folder with the benchmarks' upstream files; default: {ROWS_VARIABLE}",
    )
    parser.add_argument("--only", action="append", choices=list(CASES), help="measure this alone; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--limit", type=int, help="items of each task, instead of each benchmark's own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        logging.basicConfig(level=logging.INFO)  # for lm-eval's word that it begins
        run(Job.read(options.child))
        return
    if options.data is None or not options.data.is_dir():
        parser.error(f"--data: got {options.data}, expected the folder that holds mmlu, gsm8k, humaneval and bbh")
    model = fetch_embedded("smollm2-135m-instruct", home=read_settings().home, progress=lambda line: None)
    with tempfile.TemporaryDirectory(prefix="varflow-benchmark-") as scratch:
        mirror = Path(scratch) / "mirror"
        build_mirror(options.data.resolve(), mirror)
        add_code_eval(mirror)
        result: dict[str, Any] = {name: {} for name in ("time_ratio", "identical", "seconds", "startup_seconds")}
        for name in options.only or CASES:
            config = CASES[name].model_copy(update={"limit": options.limit or CASES[name].limit})
            case = Case(name, config, model=model, mirror=mirror, folder=Path(scratch) / name, threads=options.threads)
            for key, value in case.compare(repeats=options.repeats, talk=not options.json).items():
                result[key][name] = value
    machine = {"cores": os.cpu_count(), "threads": options.threads, "python": platform.python_version()}
    print(json.dumps(result | machine | {"batch_size": BATCH_SIZE, "repeats": options.repeats}))


class Case:
    """One benchmark, run by either side in a process of its own."""

    def __init__(
        self, name: str, config: BenchmarkConfig, *, model: Path, mirror: Path, folder: Path, threads: int
    ) -> None:
        self.name, self.config, self.model, self.mirror, self.folder = name, config, model, mirror, folder
        self.environment = offline_environment(folder, threads=threads)

    def compare(self, *, repeats: int, talk: bool) -> dict[str, Any]:
        """Run both sides in turn; return the ratio of their medians, and whether every pair of results is the same."""
        stock, ours, found = [], [], []
        for repeat in range(repeats):
            paths = {side: self.folder / f"{side}-{repeat}" for side in ("stock", "ours")}
            stock.append(self.run_stock(paths["stock"]))
            ours.append(self.run_ours(paths["ours"]))
            found += differences(self.config, ours=paths["ours"] / "output", stock=paths["stock"])
            if talk:
                print(f"{self.name}: stock {stock[-1]}, ours {ours[-1]}", *found[:3], sep="\n  ", flush=True)
        seconds = {side: median(runs, "work_seconds") for side, runs in (("stock", stock), ("ours", ours))}
        startup = {side: median(runs, "startup_seconds") for side, runs in (("stock", stock), ("ours", ours))}
        ratio = round(seconds["ours"] / seconds["stock"], 3)
        return {"time_ratio": ratio, "identical": not found, "seconds": seconds, "startup_seconds": startup}

    def run_stock(self, output: Path) -> Timed:
        """Run `python -m lm_eval`."""
        command = stock_command(self.config, policy=self.model, output=output, batch_size=BATCH_SIZE)
        return run_timed(command, cwd=self.mirror, environment=self.environment)

    def run_ours(self, folder: Path) -> Timed:
        """Run the job `benchmark`."""
        job = {
            "job": "benchmark",
            "config": self.config.model_dump(mode="json"),
            "runtime": {"device": "cpu", "microbatch_tokens": BATCH_SIZE * 256},
            "inputs": {"model": str(self.model), "mirror": str(self.mirror)},
            "output": str(folder / "output"),
            "work": str(folder / "work"),
        }
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.evaluation", "--child", str(folder / "job.json")]
        return run_timed(
            command, cwd=folder, environment=self.environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
        )


def median(runs: list[Timed], field: str) -> float:
    """Return the median of one figure."""
    return round(statistics.median(getattr(run, field) for run in runs), 2)


if __name__ == "__main__":
    main()
