"""`varflow gate --explain` on a verdict of its own, without any server."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.gate.decide import write_verdict
from evaluation.gate.verdict import Verdict
from tests.evaluation.test_report import make_verdict
from tests.flows.test_cli_stack import varflow


@pytest.fixture
def verdict(tmp_path: Path) -> Verdict:
    """Write a verdict with every kind of part."""
    gain_P = np.random.default_rng(0).normal(0.4, 1.0, 80)
    made = make_verdict(
        gain_P, floors={"mmlu": 0.2}, targets={"heldout_reward": 0.0, "bbh": 0.0}, audit_share=0.2, planned_looks=4
    )
    write_verdict(made, tmp_path / "verdict.json")
    return made


def test_explains_every_part_with_test_interval_margin_and_what_would_decide(tmp_path: Path, verdict: Verdict) -> None:
    done = varflow("gate", "--explain", "verdict.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == verdict.decision
    guard = verdict.guards[0]
    row = next(line for line in lines if line.startswith("guard mmlu"))
    for shown in (
        guard.state, guard.method, f"{guard.n}", f"[{100 * guard.low:+.1f}, {100 * guard.high:+.1f}] 97.5%", "margin 5",
        f"holds {100 * guard.smallest_margin:.1f}", f"{100 * guard.detectable_difference:.1f}",
    ):  # fmt: skip
        assert shown in row, (shown, row)
    assert guard.items_to_decide is None or f"{guard.items_to_decide:,} items" in row
    for part in ("target heldout_reward", "target bbh", "floor mmlu", "growth of length", "audit heldout_reward"):
        assert any(line.startswith(part) for line in lines), part
    for reason in verdict.reasons:
        assert reason.split(":")[0] in done.stdout
    assert "look 1 of the year, of 4 planned" in done.stdout and f"seal {verdict.seal[:16]} holds" in done.stdout


def test_as_json_it_is_the_verdict_and_what_was_checked(tmp_path: Path, verdict: Verdict) -> None:
    done = varflow("gate", "--explain", "verdict.json", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["seal_holds"] is True and told["ref"] is None
    assert {name: told[name] for name in verdict.model_dump()} == verdict.model_dump(mode="json")


def test_a_verdict_that_was_touched_is_refused_in_one_message(tmp_path: Path, verdict: Verdict) -> None:
    text = (tmp_path / "verdict.json").read_text()
    (tmp_path / "verdict.json").write_text(text.replace(f'"{verdict.decision}"', '"REJECT"'))
    done = varflow("gate", "--explain", "verdict.json", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("varflow: verdict REJECT: its seal is") and done.stderr.count("\n") == 1


def test_a_policy_that_cannot_be_held_is_flagged_before_anything_runs(tmp_path: Path) -> None:
    done = varflow("run", "hh_rlhf", "--dry-run", "--set", "gate.margins.humaneval=0.01", cwd=tmp_path)
    assert "gate: humaneval: a margin of 1 points is below the 8.1 that 164 items hold" in done.stderr


def test_an_unknown_benchmark_in_the_policy_is_refused(tmp_path: Path) -> None:
    done = varflow("run", "smoke", "--dry-run", "--set", 'gate.floors={"mmlu": 0.3}', cwd=tmp_path)
    assert done.returncode == 1
    assert "the policy names benchmarks that the suite does not run: floors mmlu" in done.stderr
