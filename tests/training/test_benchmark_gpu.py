"""The benchmark of the GPU where there is none."""

import os
import subprocess
import sys
from pathlib import Path


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
