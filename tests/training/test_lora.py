"""LoRA: what is trained, what is written, and that adapter, merged weights and the trained model are one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.ranks import Ranks
from tests.training.test_logprobs import plain_logps
from training import train
from training.config import LoraConfig, Precision, Runtime
from training.data.batch import collate
from training.distributed import ALONE, World
from training.job import Job
from training.logprobs import sum_logps
from training.lora import add_adapter, write_adapter
from training.model import load_policy
from training.plan import build_on_meta, read_architecture
from training.render import Rendered
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
    planned = build_on_meta(read_architecture(inputs["base"]), LoraConfig(rank=2, alpha=8))
    assert summary["parameters"] == sum(p.numel() for p in planned.parameters()), "a plan looks for the MFU by it"
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
    summary, expected = (json.loads((job.output / "summary.json").read_text()) for job in (both, alone))
    assert summary["adapter_gap"] <= 1e-5 and summary["merged_gap"] <= 1e-5
    assert summary["flops"] == expected["flops"] > 0


def test_an_adapter_in_bfloat16_on_ranks_is_exported(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks
) -> None:
    job = make_job("train", "narrow", config={**LORA, "precision": "bfloat16"}, inputs=inputs)
    folders = {name: getattr(job, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    ranks.run(run_on, size=2, job=folders, runtime=Runtime(microbatch_tokens=64))
    summary = json.loads((job.output / "summary.json").read_text())
    assert summary["adapter_gap"] <= 1e-5 and summary["merged_gap"] <= 1e-5
    assert {tensor.dtype for tensor in load_file(job.output / "model.safetensors").values()} == {torch.float32}


@pytest.fixture(params=["untied", "tied", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_policy: Path) -> Path:
    """A base with an output head of its own, one with the embedding's, and one whose layers are no nn.Linear but Conv1D."""
    if request.param == "untied":
        return tiny_policy
    folder = tmp_path / "base"
    shutil.copytree(tiny_policy, folder)
    (folder / "model.safetensors").unlink()
    if request.param == "tied":
        model = AutoModelForCausalLM.from_pretrained(tiny_policy)
        model.config.tie_word_embeddings = True
        model.tie_weights()
    else:
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=len(tokenizer), initializer_range=0.15, **shape, **ids)
        )
    model.save_pretrained(folder)
    return folder


def train_and_measure(world: World, job: dict[str, Any], runtime: Runtime) -> tuple[list[Rendered], Tensor]:
    """Train, and return what the export was held to the policy on, and the log-probabilities of the policy that was in memory."""
    split, kept = train.split_adapter, {}

    def keep(job: Job, config: Any, policy: Any, examples: Any, world: World) -> Any:
        samples = [example.samples[0] for example in examples]
        with torch.no_grad():
            sums = [sum_logps(policy, collate([sample], device=world.device)) for sample in samples]
        kept.update(samples=samples, logp_B=torch.cat(sums))
        return split(job, config, policy, examples, world)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "split_adapter", keep)
        run_on(world, job, runtime)
    return kept["samples"], kept["logp_B"]


def test_adapter_and_merged_weights_from_disk_are_the_policy_in_memory_on_32_prompts(
    base: Path, tmp_path: Path, make_row: Any, write_rows: Any, make_job: Callable[..., Job], ranks: Ranks
) -> None:
    """Read by the stock libraries, with a softmax over the whole vocabulary; on one rank and sharded over two."""
    rows = [make_row(f"Question {i}?", [f"Answer {'very ' * (i % 5)}{i}", f"No {i}"]) for i in range(40)]
    inputs = {"rows": write_rows(tmp_path / "forty", rows), "base": base}
    written = {}
    for size in (1, 2):
        job = make_job("train", f"on{size}", config={**LORA, "batch_prompts": 8}, inputs=inputs)
        folders = {name: getattr(job, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
        arguments: dict[str, Any] = {"job": folders, "runtime": Runtime(microbatch_tokens=256)}
        samples, logp_B = (
            train_and_measure(ALONE, **arguments)
            if size == 1
            else ranks.run(train_and_measure, size=size, **arguments)[0]
        )
        assert len({sample.ids_T[: sample.start].tobytes() for sample in samples}) == len(samples) == 32
        stock, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (base, job.output))
        with torch.no_grad():
            before_B = plain_logps(stock, samples)
            merged_B = plain_logps(merged, samples)
            adapted_B = plain_logps(PeftModel.from_pretrained(stock, job.output / "adapter"), samples)
        assert (logp_B - before_B).abs().min() > 1e-2, "something was learnt of each"
        assert torch.allclose(adapted_B.double(), logp_B, rtol=0, atol=1e-4)
        assert torch.allclose(merged_B.double(), logp_B, rtol=0, atol=1e-4)
        assert merged.config.tie_word_embeddings == stock.config.tie_word_embeddings
        head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
        assert (head is embedding) == merged.config.tie_word_embeddings
        summary = json.loads((job.output / "summary.json").read_text())
        gaps = {name: value for name, value in summary.items() if name.endswith("_gap")}
        assert gaps.keys() == {"adapter_gap", "merged_gap"} | ({"gathered_gap"} if size > 1 else set())
        assert max(gaps.values()) <= 1e-5
        written[size] = load_file(job.output / "adapter" / "adapter_model.safetensors")
    assert written[1].keys() == written[2].keys()
    assert max((written[2][name] - tensor).abs().max().item() for name, tensor in written[1].items()) < 1e-5


def test_files_that_are_not_what_was_trained_are_not_exported(
    inputs: dict[str, Path], make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix of the adapter that is written otherwise, and merging that strays in one number."""
    config = {**LORA, "epochs": 3}

    def scale_one(folder: Path, described: LoraConfig, trained: dict[str, Tensor]) -> None:
        name = next(name for name in trained if ".lora_B." in name)
        write_adapter(folder, described, {**trained, name: 1.5 * trained[name]})

    merge = LoraModel.merge_and_unload

    def stray(self: LoraModel, **options: Any) -> Any:
        merged = merge(self, **options)
        merged.get_output_embeddings().weight[7] += 0.5
        return merged

    for name, (owner, attribute, broken) in {
        "adapter": (train, "write_adapter", scale_one),
        "merged": (LoraModel, "merge_and_unload", stray),
    }.items():
        job = make_job("train", name, config=config, inputs=inputs)
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=rf"LoRA export: {name} \d.* nats per token"),
        ):
            patch.setattr(owner, attribute, broken)
            train.run(job)
        assert not (job.output / "model.safetensors").exists()


def export_strayed(world: World, job: dict[str, Any]) -> str:
    """Train with a gathering that puts the parts of each matrix in another order; return what the first rank says."""

    def gather(model: Any, world: World, *, trained_only: bool = False) -> dict[str, Tensor]:
        return {
            name: tensor.roll(1, dims=0)
            for name, tensor in gather_weights(model, world, trained_only=trained_only).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gather_weights", gather)
        if not world.is_first:
            run_on(world, job, Runtime())
            return ""
        with pytest.raises(ValueError) as caught:
            run_on(world, job, Runtime())
        return str(caught.value)


def test_an_adapter_whose_parts_went_astray_is_not_exported(
    inputs: dict[str, Path], make_job: Callable[..., Job], ranks: Ranks
) -> None:
    job = make_job("train", "astray", config={**LORA, "epochs": 3}, inputs=inputs)
    folders = {name: getattr(job, name) for name in ("name", "config", "runtime", "inputs", "output", "work")}
    said, _ = ranks.run(export_strayed, size=2, job=folders)
    assert "LoRA export: the gathered adapter is " in said and "expected at most 0.001 in float32" in said
    assert not (job.output / "model.safetensors").exists()
