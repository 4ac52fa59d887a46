"""Metrics files: whole lines, finite numbers, and no step twice after a resume."""

import json
import os
from pathlib import Path

from training.metrics import MetricsWriter


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_that_are_none_are_counted_instead(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", total=2) as metrics:
        metrics.write(1, {"loss": float("nan"), "grad_norm": float("-inf"), "ess": 0.5})
    (line,) = read(tmp_path / "metrics.jsonl")
    assert line.pop("time") > 1.6e9
    assert line == {"step": 1, "total": 2, "loss_nonfinite": 1, "grad_norm_nonfinite": 1, "ess": 0.5}


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, total=4) as metrics:
        metrics.write(1)
        metrics.write(2)
        checkpoint = metrics.offset()
        metrics.write(3)
    with path.open("ab") as cut:
        cut.write(b'{"step": 4, "tot')  # killed in the middle of a line
    with MetricsWriter(path, total=4, keep_bytes=checkpoint) as metrics:
        metrics.write(3)
        metrics.write(4)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_what_a_power_cut_left_of_a_line_is_dropped(tmp_path: Path) -> None:
    """The checkpoint tells of more bytes than the disk has: another line behind half a one could be read by nobody."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, total=4) as metrics:
        for step in (1, 2, 3):
            metrics.write(step)
        checkpoint = metrics.offset()
    os.truncate(path, checkpoint - 5)
    with MetricsWriter(path, total=4, keep_bytes=checkpoint) as metrics:
        metrics.write(4)
    assert [line["step"] for line in read(path)] == [1, 2, 4]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsWriter(path, total=1) as metrics:
            metrics.write(1)
    assert len(read(path)) == 1


def test_every_line_can_be_read_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", total=3) as metrics:
        for step in (1, 2, 3):
            metrics.write(step)
            assert read(tmp_path / "metrics.jsonl")[-1]["step"] == step
