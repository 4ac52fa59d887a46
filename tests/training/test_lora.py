"""LoRA: what is trained, what is written, and that adapter, merged weights and the trained model are one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training import train
from training.job import Job

LORA = {
    "objective": "sft", "responses": "all", "batch_prompts": 4, "max_tokens": 128, "learning_rate": 1e-2,
    "lora": {"rank": 2, "alpha": 8},
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path, tiny_policy: Path, make_row: Any, write_rows: Any) -> dict[str, Path]:
    """Twelve prompts with two responses."""
    rows = [make_row(f"Question {i}?", [f"Answer {i}", "No"]) for i in range(12)]
    return {"rows": write_rows(tmp_path / "rows", rows), "base": tiny_policy}


def test_adapter_on_base_and_merged_weights_are_the_trained_model(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    job = make_job("train", "lora", config={**LORA, "epochs": 3}, inputs=inputs)
    train.run(job)
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["adapter_gap"] <= 1e-5 and summary["merged_gap"] <= 1e-5
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (inputs["base"], job.output))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, job.output / "adapter")(ids).logits
    assert (after - before).abs().max() > 1e-2, "something was learnt"
    assert torch.allclose(adapted, after, rtol=0, atol=1e-5)


def test_only_matrices_beside_linear_layers_are_trained_and_kept(
    inputs: dict[str, Path], make_job: Callable[..., Job]
) -> None:
    job = make_job("train", "lora", config=LORA, inputs=inputs, checkpoint_every_steps=1)
    train.run(job)
    before, after = (load_file(path / "model.safetensors") for path in (inputs["base"], job.output))
    assert before.keys() == after.keys(), "the export has the base's own names"
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still and all("norm" in name or "embed" in name or "lm_head" in name for name in still)
    adapter = load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    (checkpoint,) = (job.work / "checkpoints").glob("step-*")
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) < (job.output / "model.safetensors").stat().st_size


def test_a_stopped_run_goes_on_to_the_same_weights(inputs: dict[str, Path], make_job: Callable[..., Job]) -> None:
    whole = make_job("train", "whole", config={**LORA, "epochs": 2}, inputs=inputs)
    train.run(whole)
    halted = make_job("train", "halted", config={**LORA, "epochs": 2}, inputs=inputs, checkpoint_every_steps=1)
    from training.loop import Trainer

    taken = Trainer.take_step

    def stop_after_two(self: Trainer) -> Any:
        figures = taken(self)
        if self.progress.step == 2:
            self.job.stop.set()
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", stop_after_two)
        with pytest.raises(Exception, match="train"):
            train.run(halted)
    again = make_job("train", "halted", config={**LORA, "epochs": 2}, inputs=inputs)
    train.run(again)
    a, b = (load_file(job.output / "adapter" / "adapter_model.safetensors") for job in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
