"""The benchmark of the GPU where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.training_gpu import see_one_gpu


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_gpu", "--data", str(tmp_path), "--json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("benchmarks.training_gpu: torch sees no GPU on this machine")


@pytest.mark.parametrize(("given", "left"), [(None, "0"), ("", ""), ("3,5", "3"), ("GPU-8f2,GPU-1a0", "GPU-8f2")])
def test_of_several_gpus_one_is_measured(monkeypatch: pytest.MonkeyPatch, given: str | None, left: str) -> None:
    """Of several, TRL's Trainer would make a DataParallel model, which its DPO refuses."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    see_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
