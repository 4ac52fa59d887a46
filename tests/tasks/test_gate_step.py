"""The gate's step on folders as the other steps leave them: what it reads, what it writes, what its seal covers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from evaluation.answers import read_prompt_ids
from evaluation.config import GateConfig, GatePolicy, Look, NoiseConfig
from evaluation.gate.verdict import check_inputs, read_verdict
from tasks.gate import digest_inputs, gate, read_rewards
from tasks.noise import noise, read_noise
from tasks.report import pair_rewards
from tasks.weights import count_parameters, same_weights

ROWS = [f"{i:032x}" for i in range(40)]


@dataclass
class Folders:
    """An attempt that is only its folders."""

    inputs: Mapping[str, Path]
    output: Path

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return {name: hashlib.sha256(name.encode()).hexdigest() for name in self.inputs}

    def run_child(self, package: str, job: str) -> dict[str, Any]:
        raise AssertionError("the gate computes in its own process")

    def check_weights(self, name: str, read: str) -> None:
        raise AssertionError("the gate loads no weights")


def write_model(folder: Path, *, value: float = 0.0, size: int = 8, name: str = "model.safetensors") -> None:
    save_file({"a.weight": np.full(size, value, np.float32)}, folder / name)


def write_benchmark(folder: Path, correct: list[bool]) -> None:
    value = sum(correct) / len(correct)
    row = {
        "benchmark": "gsm8k_part", "task": "gsm8k", "metric": "exact_match", "filter": "none", "value": value, "stderr": 0.1,
        "n": len(correct), "task_version": 3, "num_fewshot": 4, "decides": True, "harness_version": "0.4.13",
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps([row]))
    asked = [f"Item {i}: what is {i} plus {i}, written out in {' '.join(['full'] * 8)}?" for i in range(len(correct))]
    lines = [
        json.dumps({"task": "gsm8k", "doc_id": i, "correct": float(c), "question": asked[i]})
        for i, c in enumerate(correct)
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines))
    (folder / "profile.json").write_text("{}")


def write_rows(folder: Path, file: str, **columns: list[Any]) -> None:
    pq.write_table(pa.table({"row_id": ROWS, **columns}), folder / file)


def write_answers(folder: Path, *, prompts: int = len(ROWS), cut: float = 0.0) -> None:
    """Write two answers a row, the rows spread over so many prompts."""
    asked = [[{"role": "user", "content": f"Question {i % prompts}?"}] for i in range(len(ROWS))]
    ended = [[i < cut * len(ROWS)] * 2 for i in range(len(ROWS))]
    write_rows(
        folder, "responses.parquet", prompt=asked, responses=[["four", "eight ch"] for _ in ROWS], truncated=ended
    )


def write_training_rows(folder: Path, *, train: str = "Good day.", heldout: str = "") -> None:
    turns = [[{"role": "user", "content": "Hello!"}], [{"role": "user", "content": heldout}]]
    columns = {
        "row_id": ["a" * 32, "b" * 32],
        "split": ["train", "heldout"],
        "prompt": turns,
        "responses": [["Hi.", train], ["x", "y"]],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")


@pytest.fixture
def attempt(tmp_path: Path) -> Folders:
    """Write the folders of two models: the challenger gains reward, writes as much, and scores alike."""
    names = [
        f"{who}{what}"
        for who in ("challenger", "champion")
        for what in ("", "_rewards", "_answers", "_eval_gsm8k_part")
    ]
    inputs = {name: tmp_path / name for name in (*names, "rows", "noise")}
    for folder in (*inputs.values(), tmp_path / "output"):
        folder.mkdir()
    for who, gain in (("challenger", 1.0), ("champion", 0.0)):
        write_model(inputs[who], value=gain)
        write_rows(inputs[f"{who}_rewards"], "scores.parquet", reward=[[i % 3 * gain + gain, gain] for i in range(40)])
        write_answers(inputs[f"{who}_answers"])
        write_benchmark(inputs[f"{who}_eval_gsm8k_part"], [True, False] * 30)
    write_training_rows(inputs["rows"], heldout="Item 3: what is 3 plus 3, written out in " + "full " * 8)
    floor = {"varied": "batch size", "runs": 2, "flip_rate": 0.1, "max_difference": 0.05}
    (inputs["noise"] / "noise.json").write_text(json.dumps({"gsm8k_part": [floor]}))
    return Folders(inputs, tmp_path / "output")


def run_gate(attempt: Folders, **policy: Any) -> dict[str, float]:
    looks = (Look(alpha=0.05, planned=False),) * 3
    return gate.work(GateConfig(policy=GatePolicy(margins={"gsm8k_part": 0.2}, **policy), looks=looks), attempt)


def test_the_verdict_rests_on_every_file_that_was_weighed(attempt: Folders) -> None:
    metrics = run_gate(attempt)
    verdict = read_verdict((attempt.output / "verdict.json").read_text())
    assert (verdict.decision, metrics["gate/promote"]) == ("PROMOTE", 1.0)
    assert (
        metrics["gate/heldout_reward_gain"]
        == verdict.targets[0].gain
        == pytest.approx(sum((i % 3 + 2) / 2 for i in range(40)) / 40)
    )
    assert verdict.looks.spent == 3 and any("look 4 of the year" in flag and "18.5 %" in flag for flag in verdict.flags)
    (length,) = verdict.growths
    assert (length.champion, length.challenger) == (6.0, 6.0)  # characters, the mean over a row's answers
    summary = json.loads((attempt.output / "summary.json").read_text())
    assert summary == {"verdict": "PROMOTE", "reasons": list(verdict.reasons), "seal": verdict.seal, "flags": {}}
    assert metrics["gate/gsm8k_part_in_training_data"] == 0.0  # the held-out split was not trained on
    assert "rows/rows.parquet" in verdict.inputs
    read = attempt.inputs["challenger_eval_gsm8k_part"] / "samples.jsonl"
    assert verdict.inputs["challenger_eval_gsm8k_part/samples.jsonl"] == hashlib.sha256(read.read_bytes()).hexdigest()
    assert verdict.inputs["challenger"] == attempt.fingerprints["challenger"]
    assert len(verdict.inputs) == 2 + 2 * (1 + 1 + 3) + 1 + 1
    assert (
        verdict.inputs["noise/noise.json"]
        == hashlib.sha256((attempt.inputs["noise"] / "noise.json").read_bytes()).hexdigest()
    )
    check_inputs(verdict, digest_inputs(attempt))
    read.write_text(read.read_text().replace("1.0", "0.0", 1))
    with pytest.raises(ValueError, match=r"not what it weighed: challenger_eval_gsm8k_part/samples\.jsonl"):
        check_inputs(verdict, digest_inputs(attempt))


def test_rows_of_one_prompt_are_one_observation(attempt: Folders) -> None:
    """Pairs data have several rows for one prompt, each with an id of its own; greedy answers to them are the same answer."""
    for who in ("challenger", "champion"):
        write_answers(attempt.inputs[f"{who}_answers"], prompts=5)
    gains = [[0.5 * (i % 5 > 1) - 0.1] * 2 for i in range(40)]  # -0.1, -0.1, 0.4, 0.4, 0.4 by prompt
    write_rows(attempt.inputs["challenger_rewards"], "scores.parquet", reward=gains)
    write_rows(attempt.inputs["champion_rewards"], "scores.parquet", reward=[[0.0, 0.0] for _ in ROWS])
    run_gate(attempt)
    verdict = read_verdict((attempt.output / "verdict.json").read_text())
    (target,), (length,) = verdict.targets, verdict.growths
    assert (target.n, length.n) == (5, 5) and target.gain == pytest.approx(0.2)
    assert target.p_value > 0.05 and verdict.decision == "HOLD"  # forty rows would show it: p < 0.0001
    assert len(pair_rewards(rewards_of(attempt), prompts=read_prompt_ids(attempt.inputs["champion_answers"]))) == 5


def rewards_of(attempt: Folders) -> dict[str, dict[str, float]]:
    return {who: read_rewards(attempt.inputs[f"{who}_rewards"]) for who in ("challenger", "champion")}


def test_what_a_score_and_the_answers_say_against_themselves_stands_in_the_verdict(attempt: Folders) -> None:
    run_gate(attempt)
    assert not any("champion:" in flag or "token cap" in flag for flag in read_flags(attempt))
    scores = attempt.inputs["champion_eval_gsm8k_part"] / "scores.json"
    scores.write_text(
        json.dumps([row | {"flag": "format: 30% of the answers"} for row in json.loads(scores.read_text())])
    )
    write_answers(attempt.inputs["challenger_answers"], cut=0.25)
    run_gate(attempt)
    flags = read_flags(attempt)
    assert "gsm8k_part, champion: format: 30% of the answers" in flags
    (cut,) = [flag for flag in flags if "token cap" in flag]
    assert cut.startswith("held-out answers, challenger: 25% were ended by the token cap")


def read_flags(attempt: Folders) -> tuple[str, ...]:
    return read_verdict((attempt.output / "verdict.json").read_text()).flags


def test_the_noise_floor_of_the_champion_stands_in_the_verdict(attempt: Folders) -> None:
    run_gate(attempt)
    (floor,) = read_verdict((attempt.output / "verdict.json").read_text()).noise["gsm8k_part"]
    assert (floor.varied, floor.runs, floor.max_difference) == ("batch size", 2, 0.05)


def test_what_is_varied_is_compared_kind_by_kind_with_the_run_as_it_is(attempt: Folders, tmp_path: Path) -> None:
    inputs = {"eval_gsm8k_part": attempt.inputs["champion_eval_gsm8k_part"]}
    for name, wrong in (("seed_1235", 2), ("seed_1236", 4), ("batch_1", 0), ("workers_2", 6)):
        inputs[f"{name}_eval_gsm8k_part"] = tmp_path / name
        (tmp_path / name).mkdir()
        write_benchmark(tmp_path / name, [i % 2 == 0 and i >= wrong for i in range(60)])
    metrics = noise.work(NoiseConfig(), Folders(inputs, attempt.output))
    assert metrics == {
        "noise/gsm8k_part/seed_flip_rate": pytest.approx((1 + 2 + 1) / 3 / 60), "noise/gsm8k_part/batch_flip_rate": 0.0,
        "noise/gsm8k_part/seed_max_difference": pytest.approx(2 / 60), "noise/gsm8k_part/batch_max_difference": 0.0,
        "noise/gsm8k_part/workers_flip_rate": pytest.approx(3 / 60),
        "noise/gsm8k_part/workers_max_difference": pytest.approx(3 / 60),
    }  # fmt: skip
    floors = {floor.varied: floor for floor in read_noise(attempt.output)["gsm8k_part"]}
    assert floors.keys() == {"few-shot seed", "batch size", "number of workers"} and floors["few-shot seed"].runs == 3


def test_weights_are_the_same_by_their_bytes_in_whatever_files_they_lie(attempt: Folders) -> None:
    ours, theirs = attempt.inputs["challenger"], attempt.inputs["champion"]
    two = {name: np.arange(6, dtype=np.float32) + start for start, name in enumerate(("a.weight", "b.weight"))}
    save_file(two, theirs / "model.safetensors")
    (theirs / "pytorch_model.bin").write_bytes(b"the same once more, as pickles")
    (ours / "model.safetensors").unlink()
    files = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(two, start=1)}
    for name, file in files.items():
        save_file({name: two[name]}, ours / file, metadata={"format": "pt"})
    (ours / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (ours / "consolidated.safetensors").write_bytes((theirs / "model.safetensors").read_bytes())
    assert count_parameters(ours) == count_parameters(theirs) == 12
    run_gate(attempt)
    verdict = read_verdict((attempt.output / "verdict.json").read_text())
    assert verdict.decision == "HOLD" and "the same model" in verdict.reasons[0]
    save_file({"b.weight": two["a.weight"]}, ours / files["b.weight"])
    assert not same_weights(ours, theirs)
    save_file({"b.weight": two["b.weight"].astype(np.float64)}, ours / files["b.weight"])
    assert not same_weights(ours, theirs) and count_parameters(ours) == 12
    for path in [*ours.glob("*.safetensors"), *theirs.glob("*.safetensors"), ours / "model.safetensors.index.json"]:
        path.unlink()
    assert not same_weights(ours, theirs)  # of none nothing can be said


def test_a_cost_bound_weighs_parameters_and_not_the_files_they_lie_in(attempt: Folders) -> None:
    write_model(attempt.inputs["challenger"], value=1.0, size=80)
    (attempt.inputs["champion"] / "pytorch_model.bin").write_bytes(b"x" * 4000)
    run_gate(attempt, max_cost_growth=0.5)
    verdict = read_verdict((attempt.output / "verdict.json").read_text())
    assert verdict.decision == "HOLD" and verdict.growths[1].growth == pytest.approx(9.0)


def test_items_that_were_trained_on_are_flagged_under_the_seal_and_beside_it(attempt: Folders) -> None:
    write_training_rows(attempt.inputs["rows"], train="Sure: item 5 - what is 5 plus 5, written out in " + "full " * 8)
    assert run_gate(attempt)["gate/gsm8k_part_in_training_data"] == pytest.approx(1 / 60)
    verdict = read_verdict((attempt.output / "verdict.json").read_text())
    assert verdict.decision == "PROMOTE"  # it warns, and decides nothing
    (flag,) = [flag for flag in verdict.flags if "training data" in flag]
    assert "gsm8k_part: 1 of 60 items (1.7%)" in flag and "document 5, in row aaaaaaaaaaaa" in flag
    (found,) = json.loads((attempt.output / "contamination.json").read_text())
    assert (found["hits"], found["challenger_clean"]["items"]) == (1, 59)
    summary = json.loads((attempt.output / "summary.json").read_text())
    assert summary["flags"] == {"gsm8k_part": flag}
