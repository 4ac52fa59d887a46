"""Rewards of policies on a prompt set: numbers worked by hand, what does not change them, what is refused."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from evaluation.alignment import Answers, measure, measure_wins, read_answers
from evaluation.statistics import bootstrap_interval, tango_interval


def answers(rewards: Mapping[str, Sequence[float]], *, characters: int = 10, dropped: int = 0) -> Answers:
    return Answers(
        rewards={row: list(values) for row, values in rewards.items()},
        characters={row: [characters] * len(values) for row, values in rewards.items()},
        truncated_share=0.25,
        empty_share=0.0,
        dropped=dropped,
    )


def test_levels_gain_and_wins_worked_by_hand() -> None:
    base = answers({"a": [1.0], "b": [2.0], "c": [0.0], "d": [5.0]}, characters=8)
    model = answers({"a": [2.0], "b": [2.0], "c": [3.0], "d": [4.0]}, characters=12, dropped=1)
    found = measure("hha_helpful", model, base)
    assert (found.n, found.dropped) == (4, 1)
    assert (found.model.reward, found.baseline and found.baseline.reward) == (2.75, 2.0)
    # deviations of 2, 2, 3, 4 from 2.75: 0.5625 + 0.5625 + 0.0625 + 1.5625 = 2.75; sqrt(2.75 / 3) / sqrt(4)
    assert found.model.stderr == pytest.approx(math.sqrt(2.75 / 3) / 2)
    assert found.gain and found.gain.difference == 0.75  # of 1, 0, 3, -1; their squares about it sum to 8.75
    reach = stats.t.ppf(0.975, 3) * math.sqrt(8.75 / 3) / 2
    assert (found.gain.low, found.gain.high) == pytest.approx((0.75 - reach, 0.75 + reach))
    win = found.win_rate
    assert win and (win.won, win.tied, win.lost, win.value) == (2, 1, 1, 0.625)
    low, high = tango_interval(2, 1, n=4, confidence=0.95)
    assert (win.low, win.high) == ((1 + low) / 2, (1 + high) / 2)
    assert (found.model.characters, found.baseline and found.baseline.characters) == (12, 8)


def test_swapping_the_models_mirrors_every_figure() -> None:
    draw = np.random.default_rng(0)
    one, other = ({f"{n}": [float(r)] for n, r in enumerate(draw.normal(size=40))} for _ in range(2))
    there, back = (measure("s", *map(answers, pair)) for pair in ((one, other), (other, one)))
    assert there.gain and back.gain and there.win_rate and back.win_rate
    assert there.gain.difference == pytest.approx(-back.gain.difference)
    assert there.gain.low == pytest.approx(-back.gain.high)
    assert there.win_rate.value == 1 - back.win_rate.value
    assert there.win_rate.low == pytest.approx(1 - back.win_rate.high)


def test_more_answers_to_a_prompt_are_no_more_prompts() -> None:
    """Every answer twice: all figures stay, for intervals are over prompts. A constant on all rewards moves levels alone."""
    draw = np.random.default_rng(1)
    one, other = ({f"{n}": [float(r)] for n, r in enumerate(draw.normal(size=30))} for _ in range(2))
    once = measure("s", answers(one), answers(other))
    twice = measure("s", *(answers({row: values * 2 for row, values in side.items()}) for side in (one, other)))
    assert once == twice
    moved = measure("s", *(answers({row: [values[0] + 8] for row, values in side.items()}) for side in (one, other)))
    assert moved.model.reward == pytest.approx(once.model.reward + 8)
    assert moved.win_rate == once.win_rate
    assert moved.gain and once.gain and moved.gain.low == pytest.approx(once.gain.low)


def test_several_answers_give_the_share_of_pairs_won() -> None:
    won = measure_wins([([1.0, 3.0], [2.0, 2.0]), ([2.0, 2.0], [2.0, 1.0]), ([9.0, 9.0], [0.0, 0.0])])
    # 2 of 4 pairs; 2 of 4 and 2 ties, 0.75; all of 4
    assert won.value == pytest.approx((0.5 + 0.75 + 1) / 3) and won.method == "bootstrap over prompts"
    ends = bootstrap_interval([0.5, 0.75, 1.0], [0, 1, 2], confidence=0.95, seed=20_241_105)
    assert (won.low, won.high) == ends
    assert (won.won, won.tied, won.lost) == (2, 1, 0)


def test_equal_answers_are_half_a_win_with_an_interval() -> None:
    same = answers({f"{n}": [1.5] for n in range(50)})
    found = measure("s", same, same)
    assert found.gain and found.gain.difference == 0 and found.gain.p_value == 1
    assert found.win_rate and found.win_rate.value == 0.5 and found.win_rate.tied == 50
    z2 = stats.norm.ppf(0.975) ** 2  # no discordance leaves z^2 / (n + z^2) to either side
    assert found.win_rate.high == pytest.approx(0.5 + z2 / (50 + z2) / 2, abs=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    one, other = answers({"a": [1.0], "b": [2.0]}), answers({"a": [1.0], "c": [2.0]}, dropped=3)
    with pytest.raises(ValueError, match="s: both models must have answered the same prompts; 2 were answered by one"):
        measure("s", one, other)
    with pytest.raises(ValueError, match="s: got 1 pair, expected at least 2"):
        measure("s", answers({"a": [1.0]}), answers({"a": [2.5]}))
    alone = measure("s", answers({"a": [1.5]}), None)
    assert alone.model.stderr is None and alone.gain is None and alone.win_rate is None


def test_rewards_that_may_be_of_the_limits_are_flagged() -> None:
    cut = answers({"a": [1.0], "b": [2.0]}, dropped=7)
    flag = measure("s", cut, cut).flag
    assert flag and flag.startswith("limit: 25% of the model's answers were ended by the token limit")
    assert "limit: 25% of the baseline's answers" in flag and "prompts: 7 were too long" in flag
    assert measure("s", replace(cut, truncated_share=0.2, dropped=0), None).flag is None
    assert measure("s", replace(cut, truncated_share=0.0, empty_share=0.5, dropped=0), None).flag == (
        "empty: 50% of the model's answers have no text"
    )


def test_answers_are_read_from_the_artifacts(tmp_path: Path) -> None:
    texts: list[dict[str, Any]] = [
        {"row_id": "a", "responses": ["four", ""], "truncated": [True, False]},
        {"row_id": "b", "responses": ["six ch", "six ch"], "truncated": [False, False]},
    ]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "responses.parquet")
    scores = [{"row_id": "a", "reward": [1.0, 2.0]}, {"row_id": "b", "reward": [3.0, 3.0]}]
    pq.write_table(pa.Table.from_pylist(scores), tmp_path / "scores.parquet")
    (tmp_path / "summary.json").write_text(json.dumps({"dropped": 2}))
    found = measure("s", read_answers(tmp_path, tmp_path), None)
    assert (found.model.reward, found.model.characters, found.dropped) == (2.25, 4.0, 2)
    (tmp_path / "refused").mkdir()
    pq.write_table(pa.Table.from_pylist(scores[1:]), tmp_path / "refused" / "scores.parquet")
    found = measure("s", read_answers(tmp_path, tmp_path / "refused"), None)
    assert (found.n, found.model.reward, found.model.characters, found.dropped) == (1, 3.0, 6.0, 3)
    assert (found.model.truncated_share, found.model.empty_share) == (0.25, 0.25)
