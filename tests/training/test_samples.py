"""Answers while training: those of the model as it was, and no trace of them in what is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import Ranks
from training import samples, train
from training.config import Runtime
from training.distributed import World
from training.job import ANSWERS_FILE, Interrupted, Job, read_json_lines
from training.loop import Trainer
from training.samples import GREEDY, MOST_PROMPTS, read_step

CONFIG = {
    "objective": "sft", "responses": "all", "batch_prompts": 4, "epochs": 2, "max_tokens": 96, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any) -> dict[str, Path]:
    """Eight prompts to train on, four steps; five held out, one more than are answered."""
    rows = [
        make_row(
            f"{'Why ' * (i % 3)}{i}?" + ("\u2028So\x85\u2029?" if i == 9 else ""),  # which some take for ends of lines
            [f"Answer {i}", "No"],
            split="train" if i < 8 else "heldout",
        )
        for i in range(13)
    ]
    return {"rows": write_rows(tmp_path / "rows", rows), "base": tiny_policy}


def read_samples(output: Path) -> list[dict[str, Any]]:
    return read_json_lines(output / ANSWERS_FILE)


def answer_greedily(folder: Path, prompt: list[dict[str, str]]) -> str:
    """Return what the stock model of a folder answers, token by token and without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < GREEDY.max_new_tokens and tokenizer.eos_token_id not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


def test_answers_are_the_models_own_and_leave_no_trace(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    asked, silent = (
        make_job("train", name, config=CONFIG, inputs=inputs, samples_every_steps=every)
        for name, every in (("asked", 3), ("silent", 0))
    )
    for job in (asked, silent):
        train.run(job)
    told = read_samples(asked.output)
    assert [line["step"] for line in told] == [step for step in (0, 3, 4) for _ in range(MOST_PROMPTS)]
    assert not (silent.output / ANSWERS_FILE).exists()
    for name in ("model.safetensors", "generation_config.json", "config.json"):
        assert (asked.output / name).read_bytes() == (silent.output / name).read_bytes(), name
    for folder, line in ((inputs["base"], told[0]), (asked.output, told[-1])):
        question = line["prompt"].removeprefix("user\n").partition("\n")[0]
        assert line["answer"] == answer_greedily(folder, [{"role": "user", "content": question}])
    assert told[0]["answer"] != told[-MOST_PROMPTS]["answer"], "something was learnt"


def test_a_run_that_goes_on_tells_each_step_once(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written after the last checkpoint is written again, not twice."""
    runtime = {"samples_every_steps": 1, "checkpoint_every_steps": 2}
    whole = make_job("train", "whole", config=CONFIG, inputs=inputs, **runtime)
    train.run(whole)
    taken = Trainer.sample

    def fail_after_three(self: Trainer, sampler: Any) -> None:
        taken(self, sampler)
        if self.progress.step == 3:
            raise Interrupted("train")

    cut = make_job("train", "cut", config=CONFIG, inputs=inputs, **runtime)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "sample", fail_after_three)
        with pytest.raises(Interrupted):
            train.run(cut)
    assert read_samples(cut.output)[-1]["step"] == 3
    train.run(make_job("train", "cut", config=CONFIG, inputs=inputs, **runtime))
    assert (cut.output / ANSWERS_FILE).read_text() == (whole.output / ANSWERS_FILE).read_text()
    assert sum("\u2028So\x85\u2029?" in line["prompt"] for line in read_samples(cut.output)) == 5


def run_on(world: World, job: dict[str, Any]) -> None:
    config = train.read_config(Job(**job))
    train.train(Job(**job), config, Runtime(microbatch_tokens=64, samples_every_steps=2), world)


@pytest.mark.parametrize("line", [b"\0" * 40, b"3", b'{"step": "x"}', b"\xff", b'{"row_id": 1}'])
def test_a_line_that_a_power_cut_has_left_is_of_no_step(line: bytes) -> None:
    assert read_step(line + b"\n") == math.inf and read_step(b'{"step": 2}\n') == 2


def test_ranks_answer_together_as_one_does(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks, tmp_path: Path
) -> None:
    alone = make_job("train", "alone", config=CONFIG, inputs=inputs, samples_every_steps=2, microbatch_tokens=64)
    train.run(alone)
    both = make_job("train", "both", config=CONFIG, inputs=inputs)
    job = {name: getattr(both, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    ranks.run(run_on, size=2, job=job)
    assert (both.output / ANSWERS_FILE).read_text() == (alone.output / ANSWERS_FILE).read_text()


def test_prompts_that_the_context_has_no_room_for_are_not_answered(
    inputs: dict[str, Path], make_job: Callable[..., Job], tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.mkdir()
    for path in inputs["base"].iterdir():
        text = path.read_bytes().replace(b'"max_position_embeddings": 1024', b'"max_position_embeddings": 96')
        (short / path.name).write_bytes(text)
    job = make_job("train", "short", config={**CONFIG, "epochs": 1}, inputs={**inputs, "base": short})
    train.run(job)
    assert all(len(line["prompt"]) < 60 for line in read_samples(job.output))


def test_answers_that_have_no_room_together_are_given_by_fewer_at_once(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on as it did: answers are for who looks, and end no run."""
    generate, refused = samples.generate_batch, []

    def without_room(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        if len(prompts) > 1:
            refused.append(len(prompts))
            raise torch.OutOfMemoryError("tried to allocate a batch")
        return generate(model, prompts, **options)

    jobs = [make_job("train", name, config=CONFIG, inputs=inputs) for name in ("roomy", "cramped")]
    train.run(jobs[0])
    monkeypatch.setattr(samples, "generate_batch", without_room)
    train.run(jobs[1])
    assert refused == [4, 2, 2] * 2, "before the first step and after the last"
    for name in (ANSWERS_FILE, "model.safetensors"):
        assert (jobs[0].output / name).read_bytes() == (jobs[1].output / name).read_bytes()
