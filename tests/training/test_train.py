"""The job train: what it writes, that it learns, and what it refuses."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import generate, loop, reference, train
from training.config import Precision
from training.data.batch import collate
from training.data.examples import load_examples, read_scores
from training.data.rows import RowsWriter, read_rows
from training.data.schema import SCHEMA
from training.data.selection import select_all, select_preferred_first
from training.job import Interrupted, Job
from training.logprobs import sum_logps
from training.model import load_policy
from training.objectives import lambdas, transforms, var
from training.render import Renderer

VAR = {"objective": "var", "reference_factor": "mean", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-3}


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> dict[str, Path]:
    """Ten prompts, the train split scored by a reward that likes short answers, and the reference column."""
    rows = [
        make_row(
            f"Question {i}?",
            [f"Answer {'very ' * (i % 4)}long", "No", f"Maybe {i}"][: 2 + i % 2],
            split="heldout" if i == 9 else "train",
        )
        for i in range(10)
    ]
    folder = write_rows(tmp_path / "rows", rows)
    rewards = write_rewards(tmp_path / "rewards", {r["row_id"]: [-float(len(a)) for a in r["responses"]] for r in rows})
    job = make_job(
        "score_reference", "reference", config={"max_tokens": 128}, inputs={"rows": folder, "reference": tiny_policy}
    )
    reference.run(job)
    return {"rows": folder, "base": tiny_policy, "rewards": rewards, "reference": job.output}


def read_summary(job: Job) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((job.output / "summary.json").read_text())
    return summary


def read_metrics(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]


def test_writes_a_model_that_loads_and_has_moved(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    job = make_job("train", "a", config={**VAR, "epochs": 2}, inputs=inputs)
    train.run(job)
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (inputs["base"], job.output))
    unmoved = [n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if torch.equal(a, b)]
    assert unmoved == []
    assert AutoTokenizer.from_pretrained(job.output).chat_template
    assert {p.name for p in job.output.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "weights.parquet",
        "summary.json",
        "metrics.jsonl",
    }
    assert not any(p.name.endswith(".partial") for p in job.output.iterdir())
    summary, metrics = read_summary(job), read_metrics(job)
    assert (summary["rows"], summary["responses"], summary["steps"], summary["dropped"]) == (9, 22, 4, 0)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert {m["total"] for m in metrics} == {4}
    names = "loss grad_norm learning_rate ess ess_collapsed weight_max reward_tilt kl_weights argmax_agreement tokens_per_second padding_share logp_ratio memory_gib peak_memory_gib"
    assert all(f"train/{name}" in line for name in names.split() for line in metrics)
    assert metrics[0]["train/reward_tilt"] > 0
    assert summary["final_loss"] == metrics[-1]["train/loss"]
    assert all(isinstance(v, int | float | str) for v in summary.values())


def test_first_step_starts_at_the_reference(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    """Base = reference, so before the first update the mean log-ratio is 0 up to the rounding of another batch shape."""
    job = make_job("train", "a", config=VAR, inputs=inputs)
    train.run(job)
    assert abs(read_metrics(job)[0]["train/logp_ratio"]) < 1e-4
    assert abs(read_metrics(job)[-1]["train/logp_ratio"]) > 1e-3


def test_log_probabilities_are_told_of_chosen_rejected_and_best_responses(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """One step over all rows, at the reference: the means are those of the stored log-probabilities."""
    job = make_job("train", "a", config={**VAR, "batch_prompts": 64}, inputs=inputs)
    train.run(job)
    (line,) = read_metrics(job)
    trained = {row["row_id"] for row in pq.read_table(job.output / "weights.parquet").to_pylist()}
    scores, rewards = (
        {row["row_id"]: row[name] for row in pq.read_table(inputs[folder] / "scores.parquet").to_pylist()}
        for folder, name in (("reference", "logp"), ("rewards", "reward"))
    )
    kinds: dict[str, list[float]] = {"chosen": [], "rejected": [], "best": []}
    for row in pq.read_table(inputs["rows"] / "rows.parquet").to_pylist():
        if row["row_id"] not in trained:
            continue
        logp, reward = scores[row["row_id"]], rewards[row["row_id"]]
        for k, response in enumerate(row["responses"]):
            if response in row["responses"][:k]:
                continue
            kinds["best"] += [logp[k]] if reward[k] == max(reward) else []
            if row["preferred"] is not None:
                kinds["chosen" if response == row["responses"][row["preferred"]] else "rejected"].append(logp[k])
    assert all(kinds.values())
    for kind, values in kinds.items():
        assert line[f"train/logp_{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-3)


def test_weights_are_those_of_the_objective(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    job = make_job("train", "a", config={**VAR, "lambda_unit": "reward", "lambda_": 3.0}, inputs=inputs)
    train.run(job)
    reward = {r["row_id"]: r["reward"] for r in pq.read_table(inputs["rewards"] / "scores.parquet").to_pylist()}
    scores = {r["row_id"]: r for r in pq.read_table(inputs["reference"] / "scores.parquet").to_pylist()}
    rows = pq.read_table(job.output / "weights.parquet").to_pylist()
    assert len(rows) == 9
    for row in rows:
        stored = scores[row["row_id"]]
        score = [
            logp / n + r / 3.0
            for logp, n, r in zip(stored["logp"], stored["num_tokens"], reward[row["row_id"]], strict=True)
        ]
        total = sum(math.exp(s) for s in score)
        assert row["weight"] == pytest.approx([len(score) * math.exp(s) / total for s in score], rel=1e-9)
    summary = read_summary(job)
    assert summary["lambda"] == 3.0
    assert 0 < summary["mean_ess"] <= 1
    means = [np.divide(scores[row["row_id"]]["logp"], scores[row["row_id"]]["num_tokens"]) for row in rows]
    freedom = sum(len(mean_K) - 1 for mean_K in means)
    for name, values in (
        ("reference_factor", means),
        ("reward_over_lambda", [np.array(reward[row["row_id"]]) / 3.0 for row in rows]),
    ):
        spread = sum(((value_K - value_K.mean()) ** 2).sum() for value_K in values) / freedom
        assert summary[f"variance_{name}"] == pytest.approx(spread, rel=1e-9)


def test_lambda_of_an_effective_sample_size_is_in_the_summary(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    config = {**VAR, "reference_factor": "none", "lambda_unit": "ess_target", "lambda_": 0.7}
    job = make_job("train", "a", config=config, inputs=inputs)
    train.run(job)
    summary = read_summary(job)
    assert summary["mean_ess"] == pytest.approx(0.7, abs=1e-6)
    assert 0 < summary["lambda"] < 100 and 0 <= summary["ess_collapsed"] < 0.5
    refused = make_job("train", "b", config={**config, "lambda_": 0.01}, inputs=inputs)
    with pytest.raises(ValueError, match=r"got 0\.01, expected a share of K between 0\.\d+ and 1:"):
        train.run(refused)


def test_a_reward_transform_changes_the_weights_and_says_so(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    config = {
        **VAR,
        "reference_factor": "none",
        "lambda_unit": "reward",
        "lambda_": 0.5,
        "reward_transform": "quantile",
    }
    job = make_job("train", "a", config=config, inputs=inputs)
    train.run(job)
    reward = {r["row_id"]: r["reward"] for r in pq.read_table(inputs["rewards"] / "scores.parquet").to_pylist()}
    for row in pq.read_table(job.output / "weights.parquet").to_pylist():
        K = len(row["weight"])
        rank = [sorted(reward[row["row_id"]]).index(r) + 0.5 for r in reward[row["row_id"]]]  # no ties in these rewards
        total = sum(math.exp(k / K / 0.5) for k in rank)
        assert row["weight"] == pytest.approx([K * math.exp(k / K / 0.5) / total for k in rank], rel=1e-9)
    summary = read_summary(job)
    assert (summary["reward_transform"], summary["tied_prompts"], summary["lambda"]) == ("quantile", 0, 0.5)


@pytest.mark.parametrize(
    ("transform", "clip"), [("centred", {}), ("clipped", {"clip_low": -10.0, "clip_high": -3.0}), ("none", {})]
)
def test_weights_of_a_whole_batch_are_those_of_its_transformed_rewards(
    transform: str, clip: dict[str, float], inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """All rows in one step: w = N softmax(r / lambda) over the batch, worked out from the stored rewards."""
    config = {
        **VAR,
        "reference_factor": "none",
        "lambda_unit": "reward",
        "lambda_": 4.0,
        "normaliser": "in_batch",
        "batch_prompts": 64,
    }
    job = make_job("train", "a", config={**config, "reward_transform": transform, **clip}, inputs=inputs)
    train.run(job)
    stored = {r["row_id"]: r["reward"] for r in pq.read_table(inputs["rewards"] / "scores.parquet").to_pylist()}
    rows = pq.read_table(job.output / "weights.parquet").to_pylist()
    groups = [np.array(stored[row["row_id"]]) for row in rows]
    if transform == "centred":
        groups = [reward_K - reward_K.mean() for reward_K in groups]
    if transform == "clipped":
        assert read_summary(job)["clipped_rewards"] == sum(((g < -10) | (g > -3)).sum() for g in groups) > 0
        groups = [reward_K.clip(-10, -3) for reward_K in groups]
    score_R = np.concatenate(groups) / 4.0
    expected_R = len(score_R) * np.exp(score_R) / np.exp(score_R).sum()
    assert np.concatenate([row["weight"] for row in rows]) == pytest.approx(expected_R, rel=1e-9)


def test_a_full_fine_tune_in_bfloat16_keeps_float32_weights_and_follows_float32(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """A learning rate whose steps bfloat16's 8 bits would swallow: all that would be left of them if weights were narrow."""
    jobs = {}
    for precision in ("float32", "bfloat16"):
        config = {**VAR, "learning_rate": 1e-5, "epochs": 2, "precision": precision}
        jobs[precision] = make_job("train", precision, config=config, inputs=inputs)
        train.run(jobs[precision])
    before, wide, narrow = (
        load_file(folder / "model.safetensors") for folder in (inputs["base"], *(job.output for job in jobs.values()))
    )
    assert {tensor.dtype for tensor in narrow.values()} == {torch.float32}
    assert all((narrow[name] != tensor).float().mean() > 0.5 for name, tensor in before.items() if "layers" in name)
    moved = {name: torch.stack([(end[name] - before[name]).norm() for end in (wide, narrow)]) for name in before}
    assert all(0.5 < norms[1] / norms[0] < 2 for name, norms in moved.items() if "layers" in name)
    losses = {name: [line["train/loss"] for line in read_metrics(job)] for name, job in jobs.items()}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=3e-2) and losses["bfloat16"] != losses["float32"]


def test_training_moves_mass_to_the_better_answers(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    """Against the same training with unit weights, every prompt's best answer gains on its worst."""
    shared = {"batch_prompts": 4, "max_tokens": 128, "epochs": 8, "learning_rate": 3e-3}
    configs: dict[str, dict[str, Any]] = {
        "var": {"objective": "var", "reference_factor": "none", "lambda_": 0.3, **shared},
        "sft": {"objective": "sft", "responses": "all", **shared},
    }
    logps: dict[str, dict[str, list[float]]] = {}
    for name, config in configs.items():
        job = make_job("train", name, config=config, inputs=inputs)
        train.run(job)
        folders = {"rows": inputs["rows"], "reference": job.output}
        scored = make_job("score_reference", f"scored-{name}", config={"max_tokens": 128}, inputs=folders)
        reference.run(scored)
        logps[name] = {r["row_id"]: r["logp"] for r in pq.read_table(scored.output / "scores.parquet").to_pylist()}
    rewards = {r["row_id"]: r["reward"] for r in pq.read_table(inputs["rewards"] / "scores.parquet").to_pylist()}
    for row_id, reward in rewards.items():
        best, worst = reward.index(max(reward)), reward.index(min(reward))
        margin = {name: logp[row_id][best] - logp[row_id][worst] for name, logp in logps.items()}
        assert margin["var"] > margin["sft"]


def test_sft_takes_the_chosen_response_or_all(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    folders = {k: v for k, v in inputs.items() if k in ("rows", "base")}
    config = {"objective": "sft", "batch_prompts": 4, "max_tokens": 128}
    chosen = make_job("train", "chosen", config=config, inputs=folders)
    every = make_job("train", "all", config={**config, "responses": "all"}, inputs=folders)
    train.run(chosen)
    train.run(every)
    weights = pq.read_table(chosen.output / "weights.parquet").to_pylist()
    assert sorted(map(tuple, (w["weight"] for w in weights))) == [(1.0, 0.0)] * 5 + [(1.0, 0.0, 0.0)] * 4
    assert (read_summary(chosen)["responses"], read_summary(every)["responses"]) == (9, 22)


DPO = {"objective": "dpo", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 3e-3, "epochs": 6}


def test_dpo_learns_the_preferences_from_stored_reference_log_probabilities(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    job = make_job("train", "dpo", config=DPO, inputs={k: v for k, v in inputs.items() if k != "rewards"})
    train.run(job)
    metrics, summary = read_metrics(job), read_summary(job)
    # the base is the reference: no implicit reward, a loss of log 2, up to the rounding of another batch shape
    assert metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(metrics[0]["train/rewards/chosen"]) < 1e-4 and abs(metrics[0]["train/rewards/margins"]) < 1e-4
    last = metrics[-1]
    assert last["train/loss"] < 0.5 and last["train/rewards/accuracies"] == 1.0
    assert last["train/rewards/margins"] > 0.5
    assert last["train/rewards/margins"] == pytest.approx(
        last["train/rewards/chosen"] - last["train/rewards/rejected"], abs=1e-9
    )
    assert "train/ess" not in last and "mean_ess" not in summary  # comparisons weigh no response
    assert not (job.output / "weights.parquet").exists()
    assert (summary["rows"], summary["responses"], summary["dropped"]) == (9, 22, 0)


def test_dpo_takes_the_preferred_response_first_and_leaves_out_rows_without_one(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job]
) -> None:
    made = [
        make_row("Last?", ["No", "Maybe", "Yes"], preferred=2),
        make_row("Twice?", ["Yes", "No", "Yes", "No"], preferred=2),
        make_row("Nobody said?", ["Yes", "No"], preferred=None),
        make_row("All equal?", ["Yes", "Yes"], preferred=0),
        make_row("Too long?", ["Yes", "word " * 200], preferred=0),
    ]
    for regime, responses in (("support", 5), ("from_reference", 6)):  # of "Twice?": Yes, No; or Yes, No, No
        rows = write_rows(tmp_path / regime, made, regime=regime)
        folders = {"rows": rows, "reference": tiny_policy}
        scored = make_job("score_reference", f"scored-{regime}", config={"max_tokens": 128}, inputs=folders)
        reference.run(scored)
        inputs = {"rows": rows, "base": tiny_policy, "reference": scored.output}
        job = make_job("train", f"dpo-{regime}", config={**DPO, "epochs": 1}, inputs=inputs)
        train.run(job)
        summary = read_summary(job)
        assert (summary["rows"], summary["responses"]) == (2, responses)
        assert [summary[f"dropped_{why}"] for why in ("no_preference", "too_few_responses", "not_scored")] == [1, 1, 1]
    assert select_preferred_first(made[0], distinct=True) == [2, 0, 1]
    assert select_preferred_first(made[1], distinct=True) == [2, 1]
    assert select_preferred_first(made[1], distinct=False) == [2, 1, 3]


def test_a_warning_where_the_reference_outweighs_the_reward(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """`sum` sides with short responses; a reward for long ones is not heard."""
    rewards = pq.read_table(inputs["rewards"] / "scores.parquet").to_pylist()
    from training.data.rows import RowsWriter

    with RowsWriter(inputs["rewards"] / "scores.parquet", pq.read_schema(inputs["rewards"] / "scores.parquet")) as out:
        out.write([{**r, "reward": [-v for v in r["reward"]]} for r in rewards])
    job = make_job("train", "a", config={**VAR, "reference_factor": "sum"}, inputs=inputs)
    train.run(job)
    summary = read_summary(job)
    assert summary["argmax_agreement"] < 0.6
    assert "heaviest weight" in summary["warning"]


def test_equal_responses_count_once_in_a_set_and_each_among_samples(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> None:
    rows = [make_row("One?", ["Yes", "No", "Yes"]), make_row("Two?", ["Yes", "Yes"])]
    rewards = write_rewards(tmp_path / "rewards", {r["row_id"]: [1.0, 0.0, 1.0][: len(r["responses"])] for r in rows})
    config = {**VAR, "reference_factor": "none", "lambda_unit": "reward", "lambda_": 1 / math.log(3)}
    inputs = {"base": tiny_policy, "rewards": rewards}
    results = {}
    for regime in ("support", "from_reference"):
        folder = write_rows(tmp_path / regime, rows, regime=regime)
        job = make_job("train", f"out-{regime}", config=config, inputs={**inputs, "rows": folder})
        train.run(job)
        results[regime] = (
            {r["row_id"]: r["weight"] for r in pq.read_table(job.output / "weights.parquet").to_pylist()},
            read_summary(job),
        )
    weights, summary = results["support"]
    assert weights == {rows[0]["row_id"]: pytest.approx([1.5, 0.5, 0.0])}
    assert (summary["dropped_too_few_responses"], summary["responses_left_out"]) == (1, 1)
    weights, summary = results["from_reference"]
    assert summary["responses_left_out"] == 0
    assert weights[rows[0]["row_id"]] == pytest.approx([9 / 7, 3 / 7, 9 / 7])
    assert weights[rows[1]["row_id"]] == pytest.approx([1.5, 0.5])


def test_samples_of_another_policy_are_weighed_by_their_stored_log_q(
    tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any, write_rewards: Any, make_job: Callable[..., Job]
) -> None:
    made = [make_row(f"Question {i}?", ["Yes", "No", "Yes"], logq=[-2.5 - i, -1.0, -2.5 - i]) for i in range(5)]
    rows = write_rows(tmp_path / "rows", made, regime="from_behaviour")
    rewards = write_rewards(tmp_path / "rewards", {row["row_id"]: [1.0, 0.0, 1.0] for row in made})
    scored = make_job(
        "score_reference", "reference", config={"max_tokens": 128}, inputs={"rows": rows, "reference": tiny_policy}
    )
    reference.run(scored)
    logps = {r["row_id"]: r["logp"] for r in pq.read_table(scored.output / "scores.parquet").to_pylist()}
    inputs = {"rows": rows, "base": tiny_policy, "rewards": rewards, "reference": scored.output}
    job = make_job("train", "a", config={**VAR, "reference_factor": "sum", "lambda_unit": "reward"}, inputs=inputs)
    train.run(job)
    weights = {r["row_id"]: r["weight"] for r in pq.read_table(job.output / "weights.parquet").to_pylist()}
    for row in made:
        scores = [p + r - q for p, r, q in zip(logps[row["row_id"]], (1.0, 0.0, 1.0), row["logq"], strict=True)]
        total = sum(math.exp(s) for s in scores)
        assert weights[row["row_id"]] == pytest.approx([3 * math.exp(s) / total for s in scores], rel=1e-9)
    assert read_summary(job)["regime"] == "from_behaviour"


def test_a_row_too_long_is_dropped_whole_and_counted(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    job = make_job("train", "a", config={**VAR, "max_tokens": 36}, inputs=inputs)
    train.run(job)
    summary = read_summary(job)
    assert 0 < summary["dropped_too_long"] == summary["dropped"] == 9 - summary["rows"]


def test_rows_the_reference_dropped_are_dropped_and_counted(
    inputs: dict[str, Path], make_job: Callable[..., Job], tiny_policy: Path
) -> None:
    short = make_job(
        "score_reference", "short", config={"max_tokens": 36}, inputs={"rows": inputs["rows"], "reference": tiny_policy}
    )
    reference.run(short)
    dropped = {json.loads(line)["row_id"] for line in (short.output / "dropped.jsonl").read_text().splitlines()}
    job = make_job("train", "a", config=VAR, inputs={**inputs, "reference": short.output})
    train.run(job)
    weights = {r["row_id"] for r in pq.read_table(job.output / "weights.parquet").to_pylist()}
    assert 0 < read_summary(job)["dropped_not_scored"] <= len(dropped)
    assert not weights & dropped


def test_samples_of_the_base_itself_are_trained_on_as_they_lie(
    inputs: dict[str, Path],
    make_job: Callable[..., Job],
    tiny_policy: Path,
    other_tokenizer: Path,
    write_rewards: Any,
    tmp_path: Path,
) -> None:
    """Generated rows are rows: sampled, scored and weighed without another ingestion, cut samples without a stop token."""
    settings = {"split": "train", "samples_per_prompt": 3, "max_new_tokens": 12}
    sampled = make_job(
        "generate",
        "sampled",
        config=settings,
        inputs={"rows": inputs["rows"], "policy": tiny_policy},
        microbatch_tokens=512,
    )
    generate.run(sampled)
    rows = [row for batch in read_rows(sampled.output) for row in batch.to_pylist()]
    rewards = write_rewards(
        tmp_path / "sampled-rewards", {r["row_id"]: [float(len(a)) for a in r["responses"]] for r in rows}, rows
    )
    folders = {"rows": sampled.output, "base": tiny_policy, "rewards": rewards}
    job = make_job("train", "on-samples", config={**VAR, "reference_factor": "none"}, inputs=folders)
    train.run(job)
    summary = read_summary(job)
    assert summary["regime"] == "from_reference" and summary["rows"] > 0

    def refuse(message: str, **manifest: Any) -> None:
        other = tmp_path / "other-samples"
        shutil.copytree(sampled.output, other, dirs_exist_ok=True)
        found = json.loads((sampled.output / "manifest.json").read_text()) | manifest
        (other / "manifest.json").write_text(json.dumps(found))
        config = {**VAR, "reference_factor": "none"}
        with pytest.raises(ValueError, match=message):
            train.run(make_job("train", "refused", config=config, inputs={**folders, "rows": other}))

    refuse(r"sampled with temperature 0\.7, so they are of another distribution", temperature=0.7)
    refuse(r"sampled with top_p 0\.95, top_k 50, so they are", top_p=0.95, top_k=50)
    refuse("does not state top_k", top_k=None)
    digests = json.loads((sampled.output / "manifest.json").read_text())["policy"]
    refuse(r"the samples of a model with other weights \(sha256 0000", policy=digests | {"weights_sha256": "0" * 64})
    sft = {**DPO, "objective": "sft", "responses": "all", "epochs": 1}
    train.run(make_job("train", "sft", config=sft, inputs=folders))
    words = "the responses are tokens of a model with other tokenizer.*sample with this model, or ingest"
    with pytest.raises(ValueError, match=words):
        train.run(make_job("train", "refused", config=sft, inputs={**folders, "base": other_tokenizer}))
    scoring = make_job(
        "score_reference",
        "refused",
        config={"max_tokens": 128},
        inputs={"rows": sampled.output, "reference": other_tokenizer},
    )
    with pytest.raises(ValueError, match=words):
        reference.run(scoring)


def test_reference_log_probabilities_of_another_model_template_or_tokenizer_are_refused(
    inputs: dict[str, Path], make_job: Callable[..., Job], tiny_policy: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other-model"
    shutil.copytree(tiny_policy, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(other)
    spoken = tmp_path / "other-template"
    shutil.copytree(tiny_policy, spoken)
    template = (spoken / "chat_template.jinja").read_text()
    (spoken / "chat_template.jinja").write_text(template + "{# means nothing, and might have #}")
    for objective in (VAR, DPO):
        for base, words in (
            (other, "logp_ref of a model with other weights"),
            (spoken, "with other chat template"),
            (other_tokenizer, "with other tokenizer"),
        ):
            job = make_job("train", "refused", config=objective, inputs={**inputs, "base": base})
            with pytest.raises(ValueError, match=f"{words}.*score the rows with this base as reference"):
                train.run(job)
    sft = make_job("train", "sft", config={**DPO, "objective": "sft", "epochs": 1}, inputs={**inputs, "base": other})
    train.run(sft)  # it reads no log-probabilities
    manifest = json.loads((inputs["reference"] / "manifest.json").read_text())
    del manifest["model"]["tokenizer_sha256"]
    (inputs["reference"] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"manifest\.json: no tokenizer_sha256 of the model; .*score the rows with this base"
    ):
        train.run(make_job("train", "refused", config=VAR, inputs=inputs))
    (inputs["reference"] / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"reference folder .*: no manifest\.json"):
        train.run(make_job("train", "refused", config=VAR, inputs=inputs))


def edit_scores(folder: Path, target: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    import pyarrow as pa

    target.mkdir()
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), target / "scores.parquet")
    if (folder / "manifest.json").exists():
        shutil.copy(folder / "manifest.json", target)
    return target


def test_refusals(inputs: dict[str, Path], make_job: Callable[..., Job], tmp_path: Path) -> None:
    def refuse(message: str, *, config: dict[str, Any] | None = None, **changed: Path | None) -> None:
        merged = {name: path for name, path in {**inputs, **changed}.items() if path is not None}
        changed_config = {name: value for name, value in {**VAR, **(config or {})}.items() if value is not None}
        job = make_job("train", "refused", config=changed_config, inputs=merged)
        with pytest.raises(ValueError, match=message):
            train.run(job)
        assert not (job.output / "summary.json").exists()

    fewer = edit_scores(inputs["rewards"], tmp_path / "fewer", lambda rows: rows[:-4])
    refuse(r"[34] rows of the train split have no reward.*another data set", rewards=fewer)
    other = edit_scores(
        inputs["reference"], tmp_path / "other", lambda rows: [{**r, "row_id": r["row_id"][::-1]} for r in rows]
    )
    refuse("9 rows of the train split have no reward or no reference", reference=other)
    retokenised = edit_scores(
        inputs["reference"],
        tmp_path / "tokens",
        lambda rows: [{**r, "num_tokens": [n + 1 for n in r["num_tokens"]]} for r in rows],
    )
    refuse("different tokenizers or chat templates", reference=retokenised)
    nan = edit_scores(
        inputs["rewards"], tmp_path / "nan", lambda rows: [{**r, "reward": [math.nan] * len(r["reward"])} for r in rows]
    )
    refuse("reward: 22 of 22 values are NaN", rewards=nan)
    short = edit_scores(
        inputs["rewards"], tmp_path / "short", lambda rows: [{**r, "reward": r["reward"][:1]} for r in rows]
    )
    refuse("reward has 1 values, the row [23] responses", rewards=short)
    refuse("no input `rewards`", rewards=None)
    refuse("logp_ref: no such column", reference=None, config={"reference_factor": "sum"})
    refuse("logp_ref: no such column; the objective dpo", reference=None, config=DPO | {"reference_factor": None})
    refuse("no scores.parquet", rewards=tmp_path)
    for name, what in (("rewards", "reward"), ("reference", "logp_ref")):
        changed = edit_scores(
            inputs[name], tmp_path / f"{name}-of-others", lambda rows: [{**r, "content_id": "0" * 32} for r in rows]
        )
        refuse(rf"row \w+: its {what} is of another prompt or other responses than the row has", **{name: changed})
    table = pq.read_table(inputs["rewards"] / "scores.parquet")
    (tmp_path / "unbound").mkdir()
    pq.write_table(table.drop_columns("content_id"), tmp_path / "unbound" / "scores.parquet")
    refuse("no column content_id; .*score the rows again", rewards=tmp_path / "unbound")
    refuse("no row of the train split is left", config={"max_tokens": 8})
    (inputs["rows"] / "manifest.json").write_text(json.dumps({"regime": "guess"}))
    refuse("regime is 'guess', expected one of")
    (inputs["rows"] / "manifest.json").write_text(json.dumps({"regime": "from_behaviour"}))
    refuse(
        "logq: 22 of 22 values are NaN or infinite, in 9 rows .first: .*ingest the rows with their log q",
        config={"reference_factor": "sum"},
    )
    (inputs["rows"] / "manifest.json").unlink()
    refuse("no manifest.json")


def test_the_loss_of_held_out_rows_is_looked_at_on_the_way(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    """At every second step and the last; looking moves nothing, and the last look is the loss of the written model."""
    config = {**VAR, "epochs": 2}
    looked = make_job("train", "looked", config=config, inputs=inputs, heldout_every_steps=2)
    train.run(looked)
    blind = make_job("train", "blind", config=config, inputs=inputs, heldout_every_steps=0)
    train.run(blind)
    lines = read_metrics(looked)
    assert ["heldout/loss" in line for line in lines] == [False, True, False, True]
    assert not any("heldout/loss" in line for line in read_metrics(blind))
    weights = [(job.output / "model.safetensors").read_bytes() for job in (looked, blind)]
    assert weights[0] == weights[1]
    again = make_job(
        "train", "again", config={**config, "learning_rate": 1e-12}, inputs=inputs | {"base": looked.output}
    )
    with pytest.raises(
        ValueError, match="reference"
    ):  # its log-probabilities are of another model, and refused as such
        train.run(again)
    model, tokenizer = load_policy(looked.output, precision=Precision.float32, device=torch.device("cpu"))
    renderer = Renderer(tokenizer, max_tokens=128)
    (row,) = [row for batch in read_rows(inputs["rows"], split="heldout") for row in batch.to_pylist()]
    samples = renderer.row(row["prompt"], row["responses"])
    logp_K = sum_logps(model, collate(samples, device=torch.device("cpu"))).detach().numpy()
    num_K = np.array([sample.num_trained for sample in samples])
    reference_K = read_scores(inputs["reference"], "logp")[row["row_id"]]["logp"] / num_K
    reward_K = -np.array([len(text) for text in row["responses"]], dtype=float)
    score_K = reference_K + reward_K / read_summary(looked)["lambda"]
    weight_K = len(samples) * np.exp(score_K - score_K.max()) / np.exp(score_K - score_K.max()).sum()
    assert lines[-1]["heldout/loss"] == pytest.approx(
        -(weight_K * logp_K).sum() / (len(samples) * read_summary(looked)["mean_trained_tokens"]), rel=1e-5
    )


def test_a_work_folder_of_another_run_is_refused_by_what_differs(
    inputs: dict[str, Path], make_job: Callable[..., Job], write_rewards: Any, tmp_path: Path
) -> None:
    """Lambda, objective, rewards, the regime and rows, each changed since the checkpoint; of the first, the third and the fourth nothing else
    is named."""

    def attempt(config: dict[str, Any], given: dict[str, Path]) -> list[str]:
        try:
            train.run(make_job("train", "a", config=config, inputs=given, checkpoint_every_steps=1))
        except ValueError as error:
            differing = str(error).split("another run (")[1].split("); give")[0]
            return [field.split(": got ")[0] for field in differing.split("; ")]
        return []

    rows = [row for batch in read_rows(inputs["rows"]) for row in batch.to_pylist()]
    scored = {row["row_id"]: [float(len(text)) for text in row["responses"]] for row in rows}
    shutil.copytree(inputs["rows"], tmp_path / "fewer")
    with RowsWriter(tmp_path / "fewer" / "rows.parquet", SCHEMA) as out:
        out.write([row for row in rows if row["row_id"] != rows[0]["row_id"]])
    assert attempt(VAR, inputs) == []
    assert attempt({**VAR, "lambda_": 3.0}, inputs) == ["config.lambda_"]
    assert attempt(VAR, {**inputs, "rewards": write_rewards(tmp_path / "other", scored)}) == ["data.scores"]
    assert {"data.rows", "data.reference"} <= set(attempt(VAR, {**inputs, "rows": tmp_path / "fewer"}))
    shutil.copytree(inputs["rows"], tmp_path / "drawn")
    told = json.loads((inputs["rows"] / "manifest.json").read_text())
    exact = {"regime": "from_reference", "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    (tmp_path / "drawn" / "manifest.json").write_text(json.dumps(told | exact))
    assert {"data.regime", "config.reference_factor"} <= set(
        attempt({**VAR, "reference_factor": "none"}, {**inputs, "rows": tmp_path / "drawn"})
    )
    sft = {"objective": "sft", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-3}
    assert {"config.objective", "config.lambda_", "data.scores"} <= set(attempt(sft, inputs))


def test_a_run_goes_on_on_a_processor_whose_exponential_has_another_last_bit(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What weights are made of is the run's, and the weights follow from it."""
    config = {**VAR, "lambda_unit": "ess_target", "lambda_": 0.8, "reward_transform": "quantile"}
    whole = make_job("train", "whole", config=config, inputs=inputs)
    train.run(whole)
    save, saved = loop.save_checkpoint, []

    def save_once(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        saved.append(1)
        raise Interrupted("train")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_once)
        with pytest.raises(Interrupted):
            train.run(make_job("train", "a", config=config, inputs=inputs, checkpoint_every_steps=1))
    for module in (lambdas, transforms, var):
        patched = module.softmax_weights
        monkeypatch.setattr(module, "softmax_weights", lambda *a, f=patched, **o: np.nextafter(f(*a, **o), 0.0))
    job = make_job("train", "a", config=config, inputs=inputs, checkpoint_every_steps=1)
    train.run(job)
    assert [line["step"] for line in read_metrics(job)] == [line["step"] for line in read_metrics(whole)]
    ours, theirs = (load_file(each.output / "model.safetensors") for each in (job, whole))
    assert all(torch.allclose(ours[name], tensor, rtol=0, atol=1e-6) for name, tensor in theirs.items())


def test_responses_that_the_template_makes_the_same_tokens_of_count_once_in_a_fixed_set(
    inputs: dict[str, Path], make_job: Callable[..., Job], make_row: Any, write_rows: Any, tmp_path: Path
) -> None:
    """The preferred one of them stays, and a row of which one response is left has none to compare it with."""
    base = shutil.copytree(inputs["base"], tmp_path / "trimming")
    template = (base / "chat_template.jinja").read_text()
    assert "{{ message['content'] }}" in template
    (base / "chat_template.jinja").write_text(template.replace("message['content'] }}", "message['content'] | trim }}"))
    rows = [make_row(f"Question {i}?", ["Yes", "Yes\n", "No"], preferred=1) for i in range(4)]
    folder = write_rows(tmp_path / "spaced", [*rows, make_row("Which?", ["Yes", "Yes "])])
    sft = {"objective": "sft", "responses": "all", "batch_prompts": 4, "max_tokens": 128}
    job = make_job("train", "spaced", config=sft, inputs={"rows": folder, "base": base})
    train.run(job)
    assert read_summary(job)["responses"] == 4 * 2 + 1
    renderer = Renderer(AutoTokenizer.from_pretrained(base), max_tokens=128)
    for distinct, places in ((True, [(1, 2)] * 4), (False, [(0, 1, 2)] * 4 + [(0, 1)])):
        examples, dropped = load_examples(folder, renderer, select=select_all, min_responses=2, distinct=distinct)
        assert [example.places for example in examples] == places
        assert dropped == ({"same_tokens": 1} if distinct else {})
    (first, *_), _ = load_examples(folder, renderer, select=select_all, distinct=True)
    assert (first.preferred, first.num_responses) == (0, 3)


@pytest.mark.parametrize("lora", [{}, {"lora": {"rank": 2}}])
def test_a_run_does_not_go_on_over_another_base(
    inputs: dict[str, Path], make_job: Callable[..., Job], tmp_path: Path, lora: dict[str, Any]
) -> None:
    """Other weights at the same path: a checkpoint of an adapter does not hold them."""
    base = shutil.copytree(inputs["base"], tmp_path / "base")
    config = {"objective": "sft", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-3} | lora
    job = make_job("train", "a", config=config, inputs={"rows": inputs["rows"], "base": base}, checkpoint_every_steps=1)
    train.run(job)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r'another run \(base: got "[0-9a-f]{64}", expected "[0-9a-f]{64}"\); give'):
        train.run(job)
