"""cross_batch: weights by hand and their limits; the matrices scored, resumed, and held to the batch plan they were made for."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from training import cross, reference, train
from training.config import Precision, RewardRender
from training.job import Interrupted, Job
from training.objectives.cross import cross_batch_weights
from training.objectives.weights import softmax_weights
from training.reward.scorer import load_scorer

GROUP = np.array([0, 0, 1, 1])
LOG2, LOG3 = math.log(2), math.log(3)
PLAN = {"batch_prompts": 4, "epochs": 2, "seed": 3, "max_tokens": 128}
SCORE = PLAN | {"reward": {"max_tokens": 64}}
VAR = PLAN | {"objective": "var", "normaliser": "cross_batch", "reference_factor": "mean", "learning_rate": 1e-3}


def test_weights_by_hand() -> None:
    # exp(s) under x_0: 1, 2, 1, 4, so Z = 8 and the own ones are 1/8 and 2/8; under x_1: 3, 1, 1, 3, Z = 8, 1/8 and 3/8
    reward = np.log([[1.0, 2.0, 1.0, 4.0], [3.0, 1.0, 1.0, 3.0]])
    expected = np.array([1, 2, 1, 3]) * 4 / 7
    assert cross_batch_weights(reward, np.zeros((2, 4)), GROUP, lambda_=1.0) == pytest.approx(expected, abs=1e-14)
    assert cross_batch_weights(2 * reward, np.zeros((2, 4)), GROUP, lambda_=2.0) == pytest.approx(expected, abs=1e-14)
    assert cross_batch_weights(np.zeros((2, 4)), reward, GROUP, lambda_=1.0) == pytest.approx(expected, abs=1e-14)


def test_a_constant_per_prompt_changes_nothing() -> None:
    reward = np.array([[0.25, -1.5, 3.0, 1.0], [2.0, 0.5, -4.0, 1.5]])
    base = np.array([[-1.0, -2.0, -4.0, -3.0], [-2.0, -8.0, -1.0, -5.0]])
    before = cross_batch_weights(reward, base, GROUP, lambda_=0.5)
    shift = np.array([[1024.0], [-4096.0]])
    assert np.array_equal(before, cross_batch_weights(reward + shift, base, GROUP, lambda_=0.5))
    # one of log pi_ref(.|x) cancels too, up to the rounding of the logarithm of Z
    assert cross_batch_weights(reward, base + shift / 16, GROUP, lambda_=0.5) == pytest.approx(before, abs=1e-11)


def test_without_a_chance_of_foreign_responses_it_is_per_prompt() -> None:
    rng = np.random.default_rng(0)
    reward, base = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    base[0, 2:] = base[1, :2] = -2000.0
    own = np.r_[reward[0, :2], reward[1, 2:]], np.r_[base[0, :2], base[1, 2:]]
    expected = softmax_weights(*own, GROUP, lambda_=0.7)
    assert cross_batch_weights(reward, base, GROUP, lambda_=0.7) == pytest.approx(expected, abs=1e-12)


def test_limits_of_lambda_and_extreme_rewards() -> None:
    reward = np.array([[5.0, -3.0, 1.0, 2.0], [0.0, 9.0, 4.0, 4.0]])
    base = np.log([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    large = cross_batch_weights(reward, base, GROUP, lambda_=1e300)
    assert large == pytest.approx(
        np.array([0.1, 0.2, 0.2, 0.1]) * 4 / 0.6, abs=1e-12
    )  # pi_ref of each under its prompt
    small = cross_batch_weights(reward, base, GROUP, lambda_=1e-300)
    assert small == pytest.approx([4, 0, 0, 0], abs=1e-12)  # x_1 has a foreign response that is better than its own
    extreme = cross_batch_weights(np.array([[1e4, -1e4, 0, 0], [0, 0, -1e4, 1e4]]), base, GROUP, lambda_=1e-3)
    assert np.isfinite(extreme).all() and extreme.sum() == pytest.approx(4, abs=1e-12)
    outdone = np.array([[0.0, 0.0, 100.0, 100.0], [100.0, 100.0, 0.0, 0.0]])
    with pytest.raises(
        ValueError, match="under every prompt responses of other prompts have all the weight at lambda 1e-307"
    ):
        cross_batch_weights(outdone, base, GROUP, lambda_=1e-307)


@pytest.fixture
def inputs(
    tmp_path: Path,
    tiny_policy: Path,
    tiny_reward_model: Path,
    make_row: Any,
    write_rows: Any,
    write_rewards: Any,
    make_job: Callable[..., Job],
) -> dict[str, Path]:
    """Ten prompts of the train split in batches of four, one of them too long for the reference, and two held out. Three answers were cut."""
    cut = {2: [True, False], 5: [False, True, True]}
    rows = [
        make_row(f"Question {i}?", [f"Answer {'very ' * (i % 4)}long", "No", f"Maybe {i}"][: 2 + i % 2], truncated=cut.get(i))
        for i in range(10)
    ]  # fmt: skip
    rows.append(make_row("Too long?", ["Yes", "word " * 120]))
    rows += [make_row(f"Kept out {i}?", ["Yes", "No"], split="heldout") for i in range(2)]
    folder = write_rows(tmp_path / "rows", rows)
    rewards = write_rewards(tmp_path / "rewards", {r["row_id"]: [float(len(a)) for a in r["responses"]] for r in rows})
    job = make_job(
        "score_reference", "reference", config={"max_tokens": 128}, inputs={"rows": folder, "reference": tiny_policy}
    )
    reference.run(job)
    return {
        "rows": folder, "base": tiny_policy, "scorer": tiny_reward_model, "rewards": rewards, "reference": job.output,
    }  # fmt: skip


def score(make_job: Callable[..., Job], inputs: dict[str, Path], name: str = "cross", **changes: Any) -> Job:
    folders = {key: inputs[key] for key in ("rows", "base", "scorer", "reference")}
    job = make_job("score_cross", name, config=SCORE | changes, inputs=folders)
    cross.run(job)
    return job


def test_the_matrices_hold_every_response_under_every_prompt(
    inputs: dict[str, Path], make_job: Callable[..., Job], capfd: pytest.CaptureFixture[str]
) -> None:
    job = score(make_job, inputs)
    found = pq.read_table(job.output / "scores.parquet").to_pylist()
    source = {row["row_id"]: row for row in pq.read_table(inputs["rows"] / "rows.parquet").to_pylist()}
    scored = {row["row_id"]: row["logp"] for row in pq.read_table(inputs["reference"] / "scores.parquet").to_pylist()}
    batches = [[row for row in found if row["step"] == step] for step in range(max(row["step"] for row in found) + 1)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]  # ten rows, two epochs
    scorer = load_scorer(
        inputs["scorer"],
        render=RewardRender.text_pair,
        max_tokens=64,
        precision=Precision.float32,
        device=torch.device("cpu"),
    )
    for batch in batches:
        responses = [text for row in batch for text in source[row["row_id"]]["responses"]]
        begin = 0
        for row in batch:
            rewards, _ = scorer.score([source[row["row_id"]]["prompt"]] * len(responses), responses, budget=4096)
            assert row["reward"] == pytest.approx(rewards.tolist(), abs=1e-5)
            own = scored[row["row_id"]]
            assert row["logp"][begin : begin + len(own)] == pytest.approx(own, abs=1e-4)
            assert len(row["logp"]) == len(responses)
            begin += len(own)
    summary = json.loads((job.output / "summary.json").read_text())
    pairs = sum(len(batch) * len(batch[0]["reward"]) for batch in batches)
    assert (summary["steps"], summary["pairs"], summary["responses"]) == (6, pairs, 25)
    assert f"score_cross: {pairs} pairs of prompt and response in 6 batches" in capfd.readouterr().err


def test_training_weighs_by_the_matrices(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    matrices = score(make_job, inputs)
    config = VAR | {"lambda_unit": "reward", "lambda_": 0.3}
    job = make_job("train", "train", config=config, inputs=inputs | {"cross": matrices.output})
    train.run(job)
    plan = pq.read_table(job.output / "weights.parquet").to_pylist()
    weights = {(row["step"], row["row_id"]): row["weight"] for row in plan}
    found = pq.read_table(matrices.output / "scores.parquet").to_pylist()
    tokens = {
        row["row_id"]: row["num_tokens"] for row in pq.read_table(inputs["reference"] / "scores.parquet").to_pylist()
    }
    for step in range(6):  # of both epochs, in which a prompt has other neighbours and another weight
        batch = [row for row in found if row["step"] == step]
        num_tokens = np.concatenate([tokens[row["row_id"]] for row in batch])
        score_GN = (
            np.array([row["reward"] for row in batch]) / 0.3 + np.array([row["logp"] for row in batch]) / num_tokens
        )
        group_N = np.repeat(np.arange(len(batch)), [len(tokens[row["row_id"]]) for row in batch])
        own = np.exp(score_GN)[group_N, np.arange(len(group_N))] / np.exp(score_GN).sum(axis=1)[group_N]
        expected = len(group_N) * own / own.sum()
        assert np.concatenate([weights[step, row["row_id"]] for row in batch]) == pytest.approx(expected, rel=1e-9)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["rows"] == 10 and summary["lambda"] == 0.3


def test_a_stopped_job_goes_on_with_the_next_batch(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(make_job, inputs, "whole")
    folders = {key: inputs[key] for key in ("rows", "base", "scorer", "reference")}
    job = make_job("score_cross", "cut", config=SCORE, inputs=folders)
    score_pairs, steps = cross.score_pairs, []

    def stop_after_two(scorer: Any, rewards: Any, pairs: Any) -> Any:
        steps.append(pairs.step)
        rows = score_pairs(scorer, rewards, pairs)
        if len(steps) == 2:
            job.stop.set()
        return rows

    monkeypatch.setattr(cross, "score_pairs", stop_after_two)
    with pytest.raises(Interrupted):
        cross.run(job)
    assert not (job.output / "scores.parquet").exists()
    job.stop.clear()
    cross.run(job)
    assert steps == list(range(6))
    assert (job.output / "scores.parquet").read_bytes() == (whole.output / "scores.parquet").read_bytes()


def test_a_reference_that_gives_no_number_is_named(
    inputs: dict[str, Path], make_job: Callable[..., Job], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    tokenizer = AutoTokenizer.from_pretrained(inputs["base"])
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(inputs["base"], tie_word_embeddings=False)
    nine = tokenizer.encode("Question 9", add_special_tokens=False)[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[nine] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"broken: got NaN or infinite log-probabilities under the prompts for 4 of 4 rows"
    ):
        score(make_job, inputs | {"base": folder})


def test_the_longest_pairs_are_looked_at_before_any_is_scored(
    inputs: dict[str, Path],
    longrope_policy: Path,
    make_job: Callable[..., Job],
    make_row: Any,
    write_rows: Any,
    tmp_path: Path,
) -> None:
    """Beyond 64 tokens this model computes otherwise: no row is as long, but a prompt of one with a response of another is."""
    made = [make_row(f"Why {'zq' * 15}?", ["Yes", "No"]), make_row("Why?", ["Yes", "zq" * 15])]
    rows = write_rows(tmp_path / "long", made)
    scoring = {"rows": rows, "reference": longrope_policy}
    job = make_job("score_reference", "short", config={"max_tokens": 128}, inputs=scoring)
    reference.run(job)
    folders = inputs | {"rows": rows, "base": longrope_policy, "reference": job.output}
    with pytest.raises(ValueError, match="llama, layout tree, float32: log-probabilities differ"):
        score(make_job, folders, "pairs")


def test_refusals(
    inputs: dict[str, Path],
    make_job: Callable[..., Job],
    tmp_path: Path,
    make_row: Any,
    write_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices = score(make_job, inputs).output

    def refuse(message: str, *, without: str = "", **changes: Any) -> None:
        folders = {name: path for name, path in (inputs | {"cross": matrices}).items() if name != without}
        with pytest.raises(ValueError, match=message):
            train.run(make_job("train", "refused", config=VAR | changes, inputs=folders))

    refuse("no input `cross`; got .*run score_cross", without="cross")
    refuse("the matrices are of the batch plan [0-9a-f]{12}, this run's is [0-9a-f]{12}", seed=4)
    refuse("the matrices are of the batch plan", batch_prompts=5)
    refuse("cross_batch: got reward_transform centred", reward_transform="centred")
    refuse("cross_batch: .*lambda_unit ess_target", lambda_unit="ess_target", lambda_=0.5)
    mixed = [make_row("Short?", ["Yes", "No " * 25]), make_row(f"{'Why ' * 20}?", ["Yes", "No"])]
    unlike = write_rows(tmp_path / "unlike", mixed)
    words = r"the prompt of row \w+ with a response of another row: \d+ tokens, the longest allowed is 128; .*raise max_tokens"
    with pytest.raises(ValueError, match=words):
        score(make_job, inputs | {"rows": unlike}, "unlike")
    with pytest.raises(
        ValueError, match=r"score_cross: \d+ pairs .* expected at most 50; lower batch_prompts or epochs"
    ):
        monkeypatch.setattr(cross, "MAX_PAIRS", 50)
        score(make_job, inputs, "many")
    sampled = write_rows(tmp_path / "sampled", [make_row("Q?", ["A", "B"])], regime="from_reference")
    with pytest.raises(ValueError, match="cross_batch: not defined for responses from_reference"):
        score(make_job, inputs | {"rows": sampled}, "sampled")
