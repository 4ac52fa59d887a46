"""A disk that is full when training is about to save: said, and after there is room the same command goes on to the same weights."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.store import Store
from tasks.artifacts import fetch_artifact
from tasks.checkpoints import find_newest
from tests.faults.command import Command, await_child, finish, killed_at_the_end, record_of, small

LEFT_BYTES = 256 << 10  # half a checkpoint of the demo's policy
EVERY = 30


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_and_then_room(
    varflow: Command, store: Store, done: dict[str, Any], full_disk: Path, tmp_path: Path
) -> None:
    """The second checkpoint finds no room, the first one stays. Undisturbed is the job of the same file, in other folders."""
    resize(full_disk, "256m")
    words = small(name="full", train__seed=51, train__epochs=40, runtime__checkpoint_every_steps=EVERY)
    with killed_at_the_end(varflow.start("run", "smoke", *words, VARFLOW_HOME=str(full_disk))) as flow:
        child = await_child(flow, full_disk, "train", metric_lines=EVERY + 2)
        folder = Path(child.cmdline()[-2]).parent
        job = json.loads((folder / "job.json").read_text())
        used = shutil.disk_usage(full_disk).used
        resize(full_disk, str(used + LEFT_BYTES))
        full_at = time.time()
        ended = finish(flow)
    assert ended.returncode == 1, ended.stderr
    told = ended.stderr[ended.stderr.rfind("varflow: ") :]
    assert "No space left on device" in told and str(full_disk) in told, ended.stderr
    assert "Traceback" not in ended.stderr
    saved, _ = find_newest(folder)
    assert saved == EVERY
    assert [path.name for path in (folder / "work" / "checkpoints").glob("*.partial")] == [
        f"step-{2 * EVERY:08d}.partial"
    ]

    resize(full_disk, "256m")
    outcome = varflow.ask("run", "smoke", *words, VARFLOW_HOME=str(full_disk))
    trained = fetch_artifact(store, record_of(store, outcome, "train"), home=tmp_path)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["total"] + 1))
    assert [line["time"] < full_at for line in lines] == [line["step"] <= EVERY for line in lines]

    other = tmp_path / "undisturbed"
    other.mkdir()
    folders = {name: str(other / name) for name in ("output", "work")}
    (other / "job.json").write_text(json.dumps(job | folders))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "training", other / "job.json"], env=environment, check=True)
    weights = [(path / "model.safetensors").read_bytes() for path in (trained, other / "output")]
    assert weights[0] == weights[1]
