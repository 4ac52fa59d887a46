"""LoRA: what is trained, what is written, and that adapter, merged weights and the trained model are one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.ranks import Ranks
from training import train
from training.config import LoraConfig, Precision, Runtime
from training.distributed import World
from training.job import Job
from training.lora import add_adapter
from training.model import load_policy
from training.sharding import gather_weights, load_sharded_policy

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


def run_on(world: World, job: dict[str, Any], runtime: Runtime) -> None:
    train.train(Job(**job), train.read_config(Job(**job)), runtime, world)


def first_adapter(world: World, folder: Path) -> dict[str, Tensor]:
    lora = LoraConfig(rank=2, alpha=8)
    policy, _ = load_sharded_policy(folder, world, precision=Precision.float32, lora=lora, seed=5)
    assert all(isinstance(p, DTensor) for p in policy.parameters())
    return gather_weights(policy.model, world, trained_only=True)


def test_an_adapter_on_ranks_begins_and_ends_as_on_one(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks, tiny_policy: Path
) -> None:
    model, _ = load_policy(tiny_policy, precision=Precision.float32, device=torch.device("cpu"))
    torch.manual_seed(5)
    add_adapter(model, LoraConfig(rank=2, alpha=8))
    drawn = ranks.run(first_adapter, size=2, folder=tiny_policy)[0]
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert drawn.keys() == expected.keys()
    assert all(torch.equal(drawn[name], p) for name, p in expected.items())

    alone = make_job("train", "alone", config={**LORA, "epochs": 3}, inputs=inputs, microbatch_tokens=64)
    train.run(alone)
    both = make_job("train", "both", config={**LORA, "epochs": 3}, inputs=inputs)
    job = {name: getattr(both, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    ranks.run(run_on, size=2, job=job, runtime=Runtime(microbatch_tokens=64, activation_checkpointing=True))
    for file in ("adapter/adapter_model.safetensors", "model.safetensors"):
        got, wanted = (load_file(j.output / file) for j in (both, alone))
        assert got.keys() == wanted.keys()
        assert max((got[name] - tensor).abs().max().item() for name, tensor in wanted.items()) < 1e-5
    config = "adapter/adapter_config.json"
    assert json.loads((both.output / config).read_text()) == json.loads((alone.output / config).read_text())
    summary = json.loads((both.output / "summary.json").read_text())
    assert summary["adapter_gap"] <= 1e-5 and summary["merged_gap"] <= 1e-5


def test_an_adapter_in_bfloat16_on_ranks_is_exported(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks
) -> None:
    job = make_job("train", "narrow", config={**LORA, "precision": "bfloat16"}, inputs=inputs)
    folders = {name: getattr(job, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    ranks.run(run_on, size=2, job=folders, runtime=Runtime(microbatch_tokens=64))
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["adapter_gap"] <= 1e-5 and summary["merged_gap"] <= 1e-5
    assert {tensor.dtype for tensor in load_file(job.output / "model.safetensors").values()} == {torch.float32}
