"""The verdict on a challenger."""

import filecmp
import json
from pathlib import Path

import pyarrow.parquet as pq

from evaluation.config import GatePolicy
from tasks.step import Attempt, Metrics, step
from training.job import write_json

CHALLENGER, CHAMPION = "challenger", "champion"


@step(version=1)
def gate(config: GatePolicy, attempt: Attempt) -> Metrics:
    """Weigh the challenger against the champion. Inputs: `challenger`, `champion` (models), and for both of them
    `<who>_rewards` and `<who>_<benchmark>`."""
    from evaluation.gate import decide  # SciPy takes a second, which a run that finds its verdict need not spend
    from evaluation.result import read_result

    inputs = attempt.inputs
    results = {
        who: [read_result(inputs[name]) for name in sorted(inputs) if name.startswith(f"{who}_eval_")]
        for who in (CHALLENGER, CHAMPION)
    }
    verdict = decide(
        config,
        challenger=results[CHALLENGER],
        champion=results[CHAMPION],
        rewards_challenger=read_rewards(inputs[f"{CHALLENGER}_rewards"]),
        rewards_champion=read_rewards(inputs[f"{CHAMPION}_rewards"]),
        same_model=same_weights(inputs[CHALLENGER], inputs[CHAMPION]),
    )
    write_json(attempt.output / "verdict.json", json.loads(verdict.model_dump_json()))
    write_json(attempt.output / "summary.json", {"verdict": verdict.decision, "reasons": list(verdict.reasons)})
    return {"gate/promote": float(verdict.decision == "PROMOTE"), "gate/reward_gain": verdict.target.gain}


def read_rewards(folder: Path) -> dict[str, float]:
    """Return the mean reward of each row's responses, by row id."""
    table = pq.read_table(folder / "scores.parquet", columns=["row_id", "reward"]).to_pydict()
    return {row: sum(values) / len(values) for row, values in zip(table["row_id"], table["reward"], strict=True)}


def same_weights(one: Path, other: Path) -> bool:
    """Tell whether two model folders hold the same weights, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    if names != sorted(path.name for path in other.glob("*.safetensors")):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
