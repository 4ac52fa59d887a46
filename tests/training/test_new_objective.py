"""An objective is one file and one line: `ranked.py` is added to a copy of the sources, then planned, trained, stopped and resumed."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.flows.test_cli_stack import varflow
from tests.training import ranked
from tests.training.ranked import Ranked, RankedConfig
from tests.training.test_checkpoint import interrupt, read_figures, read_summary, start
from training import train
from training.config import Runtime
from training.distributed import open_world
from training.job import EXIT_INTERRUPTED, Job
from training.model import start_torch
from training.objectives.dpo import DpoConfig
from training.objectives.objective import Columns, TrainConfig
from training.objectives.sft import SftConfig
from training.objectives.var import VarConfig
from training.plan import measure_workload
from training.preflight.findings import FILE

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = "training/objectives/registry.py"
CONFIG = {
    "objective": "ranked", "decay": 0.25, "batch_prompts": 4, "epochs": 4, "max_tokens": 96, "learning_rate": 1e-3,
}  # fmt: skip
RUNTIME = {"device": "cpu", "threads": 1, "microbatch_tokens": 64, "checkpoint_every_steps": 3}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The packages with the file of an objective more, and its config in the line that lists them."""
    for package in ("flows", "tasks", "training", "evaluation", "infra"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / "sources" / package, ignore=ignored)
    registry = tmp_path / "sources" / REGISTRY
    text = registry.read_text()
    line = "    VarConfig | SftConfig | DpoConfig,"
    assert text.count(line) == 1
    text = text.replace(line, line.removesuffix(",") + " | RankedConfig,")
    first = "from training.objectives.sft import"
    registry.write_text(text.replace(first, f"from training.objectives.ranked import RankedConfig\n{first}"))
    shutil.copy(ranked.__file__, registry.parent / "ranked.py")
    return tmp_path / "sources"


@pytest.fixture
def inputs(tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any) -> dict[str, str]:
    """Twelve prompts with two or three answers, and a reward that likes short ones."""
    rows = [
        make_row(f"Question {i}?", [f"Answer {'very ' * (i % 5)}{i}", "No", "Maybe"][: 2 + i % 2]) for i in range(12)
    ]
    rewards = {row["row_id"]: [-float(len(text)) for text in row["responses"]] for row in rows}
    return {
        "rows": str(write_rows(tmp_path / "rows", rows)),
        "rewards": str(write_rewards(tmp_path / "rewards", rewards)),
        "base": str(tiny_policy),
    }


def write_job(folder: Path, inputs: dict[str, str]) -> Path:
    for name in ("output", "work"):
        (folder / name).mkdir(parents=True)
    job = {"job": "train", "config": CONFIG, "runtime": RUNTIME, "inputs": inputs}
    job |= {name: str(folder / name) for name in ("output", "work")}
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def test_one_file_and_one_line_train_stop_and_resume(
    sources: Path, tmp_path: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real job in real processes; the whole run beside it is of this process, which knows no such name."""
    config = RankedConfig.model_validate(CONFIG)
    whole, cut = (write_job(tmp_path / name, inputs) for name in ("whole", "cut"))
    with pytest.raises(ValueError, match=r"tag 'ranked' found using 'objective' does not match .* 'var', 'sft', 'dpo'"):
        train.run(Job.read(whole))
    runtime = Runtime.model_validate(RUNTIME)
    with open_world(runtime, start_torch(runtime)) as world:
        train.train(Job.read(whole), config, runtime, world)

    monkeypatch.setenv("PYTHONPATH", str(sources))
    assert interrupt(cut, signal.SIGTERM, after_steps=4) == EXIT_INTERRUPTED, (cut.parent / "log").read_text()
    assert list((cut.parent / "work" / "checkpoints").glob("step-*[0-9]"))
    assert start(cut).wait() == 0, (cut.parent / "log").read_text()
    for name in ("model.safetensors", "weights.parquet"):
        assert (cut.parent / "output" / name).read_bytes() == (whole.parent / "output" / name).read_bytes(), name
    assert read_figures(cut.parent) == read_figures(whole.parent)
    assert len(read_figures(cut.parent)) == 12

    found = json.loads((cut.parent / "output" / FILE).read_text())
    outcomes = {check["name"]: check["outcome"] for check in found["checks"]}
    assert found["passed"] and outcomes.pop("reference") == "not applicable"  # it reads none
    assert set(outcomes.values()) == {"passed"} and {"weights", "unit_weights"} <= outcomes.keys()
    weights = pq.read_table(cut.parent / "output" / "weights.parquet")["weight"].to_pylist()
    assert sorted(map(len, weights)) == [2] * 24 + [3] * 24  # of four epochs
    for weight in weights:  # shares of the long answer, "No" and "Maybe": 1/4 and 1, or 1/16, 1 and 1/4
        assert weight == pytest.approx([0.4, 1.6] if len(weight) == 2 else [1 / 7, 16 / 7, 4 / 7])
    summary = read_summary(cut.parent)
    assert summary == read_summary(whole.parent)
    assert summary["best_weight"] == pytest.approx(16 / 7) and 0 < summary["mean_ess"] < 1

    work = measure_workload(Path(inputs["rows"]), config, tokenizer_folder=Path(inputs["base"]))
    assert work.rows == summary["rows"] == 12


FORM = """
import json
from flows.config import AlignConfig
from flows.overrides import override
from flows.recipes import smoke
schema = AlignConfig.model_json_schema()
chosen = override(smoke(), ["train.objective=ranked", "train.decay=0.25"]).train
print(json.dumps({"schema": schema, "chosen": chosen.model_dump(mode="json")}))
"""


def test_the_command_line_and_the_form_have_it_too(sources: Path) -> None:
    words = (
        "--set",
        "train.objective=ranked",
        "--set",
        "train.decay=0.25",
        "--rows",
        "100",
        "--tokens",
        "64",
        "--json",
    )
    done = varflow("plan", "smoke", *words, cwd=sources)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 100
    script = subprocess.run([sys.executable, "-c", FORM], cwd=sources, capture_output=True, text=True, check=True)
    told = json.loads(script.stdout)
    tabs = [option["$ref"].rpartition("/")[2] for option in told["schema"]["properties"]["train"]["anyOf"]]
    assert tabs == ["VarConfig", "SftConfig", "DpoConfig", "RankedConfig"]
    assert told["schema"]["$defs"]["RankedConfig"]["properties"]["decay"]["title"] == "Decay"
    assert (told["chosen"]["decay"], told["chosen"]["batch_prompts"]) == (0.25, 8)  # its own, and the recipe's


def test_ranks_by_hand() -> None:
    columns = Columns(("a", "b"), np.array([0, 0, 0, 1, 1]), np.ones(5), reward_R=np.array([1.0, 3.0, 2.0, 7.0, 7.0]))
    assert Ranked(0.5).weigh(columns) == pytest.approx([3 / 7, 12 / 7, 6 / 7, 1, 1])


def test_the_objectives_are_read_without_torch() -> None:
    """So the command line reads a config at once: what computes a loss imports what it takes."""
    script = (
        "import sys, training.objectives.registry, training.objectives.bradley_terry\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (SftConfig(), [(2,), (4,), (2,)]),
        (SftConfig(responses="all"), [(2, 3), (4, 3), (2, 2), (2, 3)]),
        (DpoConfig(), [(2, 3), (4, 3)]),
        (VarConfig(reference_factor="none"), [(2, 3), (4, 3), (2, 3)]),
    ],
)
def test_a_plan_counts_the_responses_that_an_objective_trains_on(
    config: TrainConfig, shapes: list[tuple[int, ...]], tmp_path: Path, make_row: Any, write_rows: Callable[..., Path]
) -> None:
    """Without a preference there is nothing for DPO and SFT on the chosen, and an answer given twice weighs once in a fixed set."""
    rows = [
        make_row("One?", ["y" * 4, "z" * 8]),
        make_row("Two?", ["z" * 8, "y" * 12], preferred=1),
        make_row("Three?", ["y" * 4, "y" * 4]),
        make_row("Four?", ["y" * 4, "z" * 8], preferred=None),
    ]
    work = measure_workload(write_rows(tmp_path / "rows", rows), config, tokenizer_folder=None)
    found = [tuple(sorted(responses)) for _, responses in work.shapes]
    assert sorted(found) == sorted(tuple(sorted(shape)) for shape in shapes) and work.rows == len(shapes)
