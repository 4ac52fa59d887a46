"""A reward model on pairs whose better answer is known: accuracies worked by hand, and one that only counts letters."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.config import PairSetConfig
from evaluation.eval_sets import write_pairs
from evaluation.reward_bias import RewardBias, measure
from evaluation.statistics import wilson_interval

PAIRS = [  # group, chosen, rejected, rewards
    ("length bias", "Two.", "It may well be three.", [1.0, 0.0]),
    ("length bias", "Four.", "It may well be five.", [0.0, 1.0]),
    ("concreteness", "A long and true answer.", "No.", [2.0, 1.0]),
    ("concreteness", "Same.", "Size.", [0.5, 0.5]),
]


def write(folder: Path, rewards: dict[str, list[float]], *, spearman: float | None = None) -> Path:
    table = [{"row_id": row, "reward": pair} for row, pair in rewards.items()]
    pq.write_table(pa.Table.from_pylist(table), folder / "scores.parquet")
    summary = {} if spearman is None else {"length_spearman": spearman}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_accuracy_by_group_worked_by_hand(tmp_path: Path) -> None:
    rows = [
        {"row_id": f"{n}", "source": group, "responses": [chosen, rejected]}
        for n, (group, chosen, rejected, _) in enumerate(PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    scores = write(tmp_path, {f"{n}": pair for n, (*_, pair) in enumerate(PAIRS)}, spearman=0.25)
    found = measure("evalbiasbench", rows=tmp_path, scores=scores)
    length, concrete = found.groups
    assert (length.group, length.n, length.accuracy, length.length_baseline) == ("length bias", 2, 0.5, 0.0)
    assert (length.low, length.high) == wilson_interval(1, n=2, confidence=0.95)
    assert (concrete.group, concrete.n, concrete.accuracy, concrete.length_baseline) == ("concreteness", 2, 0.75, 0.75)
    assert (found.overall.accuracy, found.overall.length_baseline) == (0.625, 0.375)
    assert found.macro_accuracy == 0.625 and found.length_spearman == 0.25
    # of the three pairs of unlike length the longer one has the higher reward in the second and the third
    assert found.longer_preferred == pytest.approx(2 / 3)


def test_a_pair_without_a_reward_is_in_no_figure(tmp_path: Path) -> None:
    """As where the reward model's chat template refuses it."""
    rows = [
        {"row_id": f"{n}", "source": "length bias", "responses": ["Two.", "It may well be three."]} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = measure("evalbiasbench", rows=tmp_path, scores=write(tmp_path, {"0": [1.0, 0.0], "2": [0.0, 1.0]}))
    assert (found.overall.n, found.overall.accuracy) == (2, 0.5)


def measure_real(folder: Path, output: Path, *, sign: int) -> RewardBias:
    write_pairs(folder, PairSetConfig(name="evalbiasbench"), output=output)
    rows = pq.read_table(output / "rows.parquet").to_pylist()
    scores = write(output, {row["row_id"]: [sign * float(len(text)) for text in row["responses"]] for row in rows})
    return measure("evalbiasbench", rows=output, scores=scores)


def test_a_scorer_of_length_falls_for_the_real_length_bias(real_data: Path, tmp_path: Path) -> None:
    longest, shortest = (measure_real(real_data / "evalbiasbench", tmp_path, sign=sign) for sign in (1, -1))
    assert [group.n for group in longest.groups] == [17, 14, 13, 12, 12, 12]
    by_group = {group.group: group for group in longest.groups}
    assert by_group["length bias"].accuracy < 0.1 and by_group["length bias"].high < 0.5
    assert longest.flag and longest.flag.startswith("chance: right in ")
    assert (longest.longer_preferred, shortest.longer_preferred) == (1, 0)
    assert longest.overall.accuracy == longest.overall.length_baseline
    assert longest.overall.accuracy == pytest.approx(1 - shortest.overall.accuracy)
