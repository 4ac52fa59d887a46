"""The job reward_model: it learns a rule, its figures are right, and it stops below its floor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel

from tests.ranks import Ranks
from training import reward_model
from training.config import RewardModelConfig, RewardRender, Runtime
from training.data.rows import iterate_rows
from training.distributed import ALONE, World
from training.job import Interrupted, Job, read_json_lines
from training.preflight import room
from training.preflight.findings import Report
from training.preflight.ready import Ready
from training.preflight.run import check_run
from training.reward import scorer
from training.reward.scorer import load_scorer
from training.reward_model import binomial_interval, measure_accuracy, share_of_wins

CONFIG = {"epochs": 6, "batch_prompts": 8, "learning_rate": 3e-3, "max_tokens": 64, "seed": 1}


@pytest.fixture
def rows(tmp_path: Path, make_row: Any, write_rows: Any) -> Path:
    """The preferred response mentions bread, is never the longer one, and stands at either place."""
    made = []
    for i in range(48):
        good, bad = f"bake bread {i}", f"the sky is blue today and so on {i}"
        responses = [good, bad] if i % 2 else [bad, good]
        made.append(
            make_row(f"Please explain {i}", responses, preferred=1 - i % 2, split="heldout" if i % 4 == 0 else "train")
        )
    made.append(make_row("Nobody said", ["a", "b"], preferred=None))
    made.append(make_row("Equal", ["same", "same"]))
    return write_rows(tmp_path / "rows", made)


def test_learns_the_rule_and_reports_its_figures(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job]
) -> None:
    inputs = {"rows": rows, "base": tiny_reward_model}
    job = make_job("reward_model", "a", config=CONFIG, inputs=inputs, microbatch_tokens=256)
    reward_model.run(job)
    summary = json.loads((job.output / "summary.json").read_text())
    assert (
        summary["rows"],
        summary["rows_heldout"],
        summary["dropped_no_preference"],
        summary["dropped_equal_responses"],
    ) == (36, 12, 1, 1)
    assert summary["accuracy"] == 1.0
    assert summary["length_baseline_accuracy"] == 0.0
    assert summary["accuracy_low"] == pytest.approx(0.025 ** (1 / 12)) and summary["accuracy_high"] == 1.0
    assert summary["dropout"] == 0.1
    for line in read_json_lines(job.output / "metrics.jsonl"):
        assert 0 < line["train/flop_share"] < 1 and line["train/tflops_per_second"] > 0
    found = json.loads((job.output / "preflight.json").read_text())
    assert found["passed"] and (summary["preflight_passed"], summary["preflight_failed"]) == (4, 0)
    assert [check["name"] for check in found["checks"]] == ["weights", "padding", "microbatches", "memory"]
    assert summary["preflight_peak_bytes"] == found["memory"]["peak_bytes"]
    assert AutoModelForSequenceClassification.from_pretrained(job.output).config.num_labels == 1
    scorer = load_scorer(
        job.output,
        render=RewardRender.text_pair,
        max_tokens=64,
        precision=RewardModelConfig().precision,
        device=torch.device("cpu"),
    )
    scorer.check()
    prompt = [{"role": "user", "content": "Please explain 99"}]
    rewards, _ = scorer.score([prompt, prompt], ["bake bread 99", "the sky is blue today and so on 99"], budget=256)
    assert rewards[0] > rewards[1]


def test_what_does_not_fit_is_counted_and_pairs_that_are_cut_to_the_same_tokens_are_left_out(
    tiny_reward_model: Path, tmp_path: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job]
) -> None:
    """They differ behind what the model reads: each would cost ln 2 whatever is learned, and count as half a win."""
    long = "bake bread and " * 40
    made = [
        make_row(f"Please explain {n}", [f"bake bread {n}", "the sky"], split="heldout" if n % 4 == 0 else "train")
        for n in range(16)
    ]
    made.append(make_row("Long", [long + "good", long + "bad", "the sky"]))
    made.append(make_row("Same", [long + "good", long + "bad"]))
    inputs = {"rows": write_rows(tmp_path / "rows", made), "base": tiny_reward_model}
    job = make_job("reward_model", "cut", config=CONFIG, inputs=inputs)
    reward_model.run(job)
    summary = json.loads((job.output / "summary.json").read_text())
    assert (summary["rows"], summary["dropped_same_tokens"], summary["cut_responses"]) == (13, 1, 1)


def test_a_base_whose_padding_leaks_and_one_without_room_are_refused_before_they_are_trained(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BertModel.forward

    def forward(self: Any, *arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
        return plain(self, *arguments, attention_mask=None, **options)

    job = make_job("reward_model", "a", config=CONFIG, inputs={"rows": rows, "base": tiny_reward_model})
    with monkeypatch.context() as patched:
        patched.setattr(BertModel, "forward", forward)
        with pytest.raises(ValueError, match=r"(?s)of 4 checks failed.*padding: the rewards of 3 responses.*Please"):
            reward_model.run(job)
    monkeypatch.setattr(room, "measure_free", lambda device: 300_000)
    with pytest.raises(ValueError, match=r"memory: step \d.* would take about .*got 0.3 MiB free"):
        reward_model.run(job)
    assert not (job.output / "model.safetensors").exists() and not (job.output / "metrics.jsonl").exists()


def test_the_checks_change_no_weight_and_draw_nothing(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is on in what is tried for its memory."""
    modes: list[bool] = []

    def look(ready: Ready) -> Report:
        before = {name: tensor.clone() for name, tensor in ready.policy.state_dict().items()}
        torch.manual_seed(3)
        ready.policy.model.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
        report = check_run(ready)
        drawn = torch.rand(4)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(4)) and not ready.policy.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in ready.policy.state_dict().items())
        assert all(parameter.grad is None for parameter in ready.policy.parameters())
        return report

    monkeypatch.setattr(reward_model, "check_run", look)
    job = make_job(
        "reward_model",
        "a",
        config=CONFIG | {"epochs": 1, "min_accuracy": 0.0},
        inputs={"rows": rows, "base": tiny_reward_model},
    )
    reward_model.run(job)
    assert {True, False} == set(modes)


def test_a_single_label_head_is_made_from_the_seed(rows: Path, tiny_reward_model: Path) -> None:
    config = RewardModelConfig.model_validate(CONFIG)
    first, _ = reward_model.load_base(tiny_reward_model, config, Runtime(), ALONE)
    second, _ = reward_model.load_base(tiny_reward_model, config, Runtime(), ALONE)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_base_that_lacks_more_than_a_head_is_refused(rows: Path, tiny_reward_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_reward_model, folder)
    state = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in state.items() if name.startswith("bert.")}
    assert 0 < len(headless) < len(state)
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    config = RewardModelConfig.model_validate(CONFIG)
    reward_model.load_base(folder, config, Runtime(), ALONE)
    headless.pop("bert.embeddings.word_embeddings.weight")
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 tensors \(first: bert.embeddings.word_embeddings.weight\)"):
        reward_model.load_base(folder, config, Runtime(), ALONE)


def score_without_room(world: World, folder: Path) -> list[float]:
    """Score two responses where there is room for one."""
    policy, tokenizer = reward_model.load_base(folder, RewardModelConfig.model_validate(CONFIG), Runtime(), world)
    renderer = reward_model.RewardRenderer(tokenizer, render=RewardRender.text_pair, max_tokens=64)
    compute = scorer.compute_rewards

    def refuse_two(model: Any, batch: Any) -> torch.Tensor:
        if len(batch.ids_BT) > 1:
            raise torch.OutOfMemoryError("no room")
        return compute(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "compute_rewards", refuse_two)
        inputs = renderer([[{"role": "user", "content": "a"}]] * 2, ["b", "c and d"])
        if world.size == 1:
            return list(scorer.score_batch(policy, inputs).tolist())
        with pytest.raises(torch.OutOfMemoryError):  # a rank with room would gather layers less often than this one
            scorer.score_batch(policy, inputs)
    return []


def test_a_batch_without_room_is_halved_unless_other_ranks_gather_with_it(
    tiny_reward_model: Path, ranks: Ranks
) -> None:
    assert len(score_without_room(ALONE, tiny_reward_model)) == 2
    ranks.run(score_without_room, size=2, folder=tiny_reward_model)


def test_stopped_run_ends_with_the_same_model(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job]
) -> None:
    """Dropout is on here, so the random generator's state must come back with the checkpoint."""
    inputs = {"rows": rows, "base": tiny_reward_model}
    config = {**CONFIG, "epochs": 2}
    whole = make_job("reward_model", "whole", config=config, inputs=inputs)
    reward_model.run(whole)
    job = make_job("reward_model", "cut", config=config, inputs=inputs, checkpoint_every_steps=0)

    class StopAtFourth:
        calls = 0

        def is_set(self) -> bool:
            self.calls += 1
            return self.calls >= 12  # one before each of its four checks

    with pytest.raises(Interrupted):
        reward_model.run(Job(**{**job.__dict__, "stop": StopAtFourth()}))
    steps_done = len((job.output / "metrics.jsonl").read_text().splitlines())
    assert 0 < steps_done < 10
    other = json.loads((tiny_reward_model / "config.json").read_text()) | {"hidden_dropout_prob": 0.5}
    base = shutil.copytree(tiny_reward_model, job.work / "other")
    (base / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"base_config\.hidden_dropout_prob"):
        reward_model.run(Job(**{**job.__dict__, "inputs": {**inputs, "base": base}}))
    reward_model.run(job)
    assert (job.output / "model.safetensors").read_bytes() == (whole.output / "model.safetensors").read_bytes()


def test_the_loss_of_held_out_pairs_is_looked_at_without_dropout_and_moves_nothing(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job]
) -> None:
    """At every fourth of fifteen steps and the last, when it is the loss of the written model."""
    inputs = {"rows": rows, "base": tiny_reward_model}
    written = []
    for name, every in (("looked", 4), ("blind", 0)):
        job = make_job("reward_model", name, config=CONFIG | {"epochs": 3}, inputs=inputs, heldout_every_steps=every)
        reward_model.run(job)
        lines = read_json_lines(job.output / "metrics.jsonl")
        written.append((job.output / "model.safetensors").read_bytes())
        losses = {line["step"]: line["heldout/loss"] for line in lines if "heldout/loss" in line}
        assert list(losses) == ([4, 8, 12, 15] if every else [])
        if every:
            told = losses[15]
    assert written[0] == written[1]
    judge = load_scorer(
        job.output,
        render=RewardRender.text_pair,
        max_tokens=64,
        precision=RewardModelConfig().precision,
        device=torch.device("cpu"),
    )
    margins = []
    for row in iterate_rows(rows, split="heldout"):
        reward_K, _ = judge.score([row["prompt"]] * 2, row["responses"], budget=256)
        margins.append(reward_K[row["preferred"]] - reward_K[1 - row["preferred"]])
    assert told == pytest.approx(np.log1p(np.exp(-np.array(margins))).mean(), rel=1e-4)


def test_stops_below_the_floor(
    tmp_path: Path, tiny_reward_model: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job]
) -> None:
    """Every pair is preferred both ways, so nothing is there to learn and no model is right more than half the time."""
    made = [
        make_row(f"Please {i}", [f"bake bread {i}", f"the sky {i}"][:: 1 if way else -1], split=split)
        for i in range(8)
        for way in (0, 1)
        for split in ("train", "heldout")
    ]
    folder = write_rows(tmp_path / "both", made)
    config = {**CONFIG, "epochs": 1, "min_accuracy": 0.6}
    job = make_job("reward_model", "a", config=config, inputs={"rows": folder, "base": tiny_reward_model})
    with pytest.raises(ValueError, match=r"accuracy is 0\.500 .* expected at least 0\.6; take more rows"):
        reward_model.run(job)
    assert not (job.output / "summary.json").exists()


def test_no_heldout_pairs_is_an_error(
    tmp_path: Path, tiny_reward_model: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job]
) -> None:
    folder = write_rows(tmp_path / "few", [make_row("One", ["a", "b"])])
    job = make_job("reward_model", "a", config=CONFIG, inputs={"rows": folder, "base": tiny_reward_model})
    with pytest.raises(ValueError, match="no pair of the heldout split is left"):
        reward_model.run(job)


def test_figures_by_hand() -> None:
    assert share_of_wins(np.array([1.0, 0.0, 1.0, 2.0])) == 0.5  # a win, a tie, a loss
    low, high = binomial_interval(60, 100)
    assert (low, high) == (pytest.approx(0.49721, abs=1e-5), pytest.approx(0.69671, abs=1e-5))  # R: binom.test(60, 100)
    assert binomial_interval(0, 10) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))


def test_accuracy_does_not_depend_on_the_batch(rows: Path, tiny_reward_model: Path) -> None:
    config = RewardModelConfig.model_validate(CONFIG)
    model, tokenizer = reward_model.load_base(tiny_reward_model, config, Runtime(), ALONE)
    renderer = reward_model.RewardRenderer(tokenizer, render=config.render, max_tokens=64)
    pairs = reward_model.load_pairs(rows, renderer, split="heldout")
    model.eval()
    assert Runtime().microbatch_tokens > 1
    assert measure_accuracy(model, pairs, budget=1) == measure_accuracy(model, pairs, budget=2048)


def read_norms(job: Job) -> list[float]:
    return [line["train/grad_norm"] for line in read_json_lines(job.output / "metrics.jsonl")]


def run_on(world: World, job: dict[str, Any], runtime: Runtime) -> None:
    reward_model.train(Job(**job), RewardModelConfig.model_validate(job["config"]), runtime, world)


@pytest.mark.parametrize(
    ("render", "precision", "bound"),
    [
        (RewardRender.text_pair, "float32", 1e-4),
        (RewardRender.chat_template, "float32", 1e-4),
        (RewardRender.text_pair, "bfloat16", 2e-2),
    ],
)
def test_two_ranks_give_the_reward_model_of_one(
    rows: Path,
    tiny_policy: Path,
    render: RewardRender,
    precision: str,
    bound: float,
    make_job: Callable[..., Job],
    ranks: Ranks,
) -> None:
    """A decoder without dropout, whose head is drawn, sharded over two; one rank with its activations kept."""
    config = {**CONFIG, "epochs": 2, "render": render.value, "precision": precision}
    alone, both = (
        make_job("reward_model", name, config=config, inputs={"rows": rows, "base": tiny_policy}, microbatch_tokens=128)
        for name in ("alone", "both")
    )
    reward_model.run(alone)
    job = {name: getattr(both, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    ranks.run(run_on, size=2, job=job, runtime=Runtime(microbatch_tokens=128, activation_checkpointing=True))
    got, wanted = (load_file(j.output / "model.safetensors") for j in (both, alone))
    assert got.keys() == wanted.keys() and "score.weight" in got
    assert max((got[name] - tensor).abs().max().item() for name, tensor in wanted.items()) < bound
    figures = [json.loads((j.output / "summary.json").read_text()) for j in (both, alone)]
    assert figures[0]["accuracy"] == pytest.approx(figures[1]["accuracy"], abs=0 if precision == "float32" else 0.2)
    assert figures[0]["final_loss"] == pytest.approx(figures[1]["final_loss"], rel=10 * bound)
    assert read_norms(both)[0] == pytest.approx(read_norms(alone)[0], rel=10 * bound)  # AdamW would hide a factor


def test_micro_batches_change_nothing_of_a_reward_model(
    rows: Path, tiny_policy: Path, make_job: Callable[..., Job]
) -> None:
    """Without dropout: each pair alone, a few together, a step whole."""
    config = {**CONFIG, "epochs": 2, "render": RewardRender.chat_template.value}
    jobs = [
        make_job("reward_model", str(n), config=config, inputs={"rows": rows, "base": tiny_policy}, microbatch_tokens=n)
        for n in (1, 200, 10_000)
    ]
    for job in jobs:
        reward_model.run(job)
    wanted, *others = (load_file(job.output / "model.safetensors") for job in jobs)
    for got in others:
        assert max((got[name] - tensor).abs().max().item() for name, tensor in wanted.items()) < 1e-4
    losses = [json.loads((job.output / "summary.json").read_text())["final_loss"] for job in jobs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    first, *norms = (read_norms(job) for job in jobs)  # AdamW would hide a factor
    assert len(first) == 10 and norms == [pytest.approx(first, rel=1e-3)] * 2


def test_a_stop_token_that_pads_too_learns(
    rows: Path, tiny_policy: Path, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    """As SmolLM2's: it ends every turn that a decoder reads, and an embedding drops the gradient of its pad id."""
    base = tmp_path / "padded"
    shutil.copytree(tiny_policy, base)
    stop = json.loads((base / "config.json").read_text())["eos_token_id"]
    for name, changes in (
        ("config.json", {"pad_token_id": stop}),
        ("tokenizer_config.json", {"pad_token": "<|im_end|>"}),
    ):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | changes))
    config = {**CONFIG, "epochs": 1, "weight_decay": 0.0, "render": RewardRender.chat_template.value}
    job = make_job("reward_model", "a", config=config, inputs={"rows": rows, "base": base})
    reward_model.run(job)
    before, after = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (base, job.output)
    )
    assert (after[stop] - before[stop]).abs().max() > 1e-3


def test_dropout_is_found_wherever_a_configuration_names_it(tiny_reward_model: Path, tiny_policy: Path) -> None:
    assert (reward_model.read_dropout(tiny_reward_model), reward_model.read_dropout(tiny_policy)) == (0.1, 0.0)


def test_activation_checkpointing_draws_the_same_dropout(
    rows: Path, tiny_reward_model: Path, make_job: Callable[..., Job]
) -> None:
    jobs = [
        make_job(
            "reward_model", str(again), config={**CONFIG, "epochs": 1}, inputs={"rows": rows, "base": tiny_reward_model},
            activation_checkpointing=again,
        )
        for again in (False, True)
    ]  # fmt: skip
    for job in jobs:
        reward_model.run(job)
    weights = [(job.output / "model.safetensors").read_bytes() for job in jobs]
    assert weights[0] == weights[1]
