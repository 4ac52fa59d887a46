"""LoRA (Hu et al. 2106.09685) through PEFT: small matrices beside every linear layer are trained, the base stays as it is.

The adapter is put into the model itself, so everything else works as with full fine-tuning; at the end it is written on its
own, as PEFT reads it, and merged into the base's weights, and both are held to what was trained.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import LoraConfig, Precision
from training.logprobs import ONE_TOKEN

MAX_GAP = 1e-4  # nats per token, on average, between what was trained and what is exported; one token may have ONE_TOKEN times that
# On average over tokens, between a policy on its ranks and what is gathered: other kernels and, in bfloat16, another precision.
MAX_GATHERED_GAP = {Precision.float32: 1e-3, Precision.bfloat16: 0.1}


def add_adapter(model: Any, config: LoraConfig) -> None:
    """Put trainable matrices beside every linear layer but the output head, and freeze the rest. They start as no change."""
    inject_adapter_in_model(peft_config(config), model)
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError(
            f"train.lora.rank: got {config.rank} for model type {model.config.model_type}, whose experts are tensors and no layers, so PEFT puts "
            "an adapter on them that cannot be taken out and merged as it was trained; set train.lora.rank to 0"
        )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained), f"LoRA trains {trained[:3]}"


def peft_config(config: LoraConfig) -> PeftLora:
    """Return the adapter as PEFT describes it."""
    return PeftLora(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def draw_matrices(model: Any, seed: int) -> dict[str, Tensor]:
    """Return the first matrices of a model's adapter by name, on the CPU: what `add_adapter` draws after this seed.

    For a model that has no memory yet. PEFT makes both layers, which draws for each, and then draws the first one's again.
    """
    torch.manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            ((adapter, rank),) = module.r.items()
            assert module.in_features is not None and module.out_features is not None
            first = nn.Linear(module.in_features, rank, bias=False)
            second = nn.Linear(rank, module.out_features, bias=False)
            nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
            drawn[f"{name}.lora_A.{adapter}.weight"] = first.weight.detach()
            drawn[f"{name}.lora_B.{adapter}.weight"] = torch.zeros_like(second.weight)
    return drawn


@torch.no_grad()
def with_adapter(base: Any, config: LoraConfig, matrices: Mapping[str, Tensor]) -> Any:
    """Return the base with an adapter of these matrices, by their names in it."""
    add_adapter(base, config)
    parameters = dict(base.named_parameters())
    for name, matrix in matrices.items():
        parameters[name].copy_(matrix)
    return base


def take_out_adapter(model: Any) -> Any:
    """Return a model that has an adapter without it: its layers are the base's, whose weights training never touched."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config  # PEFT takes the next adapter for a second one
    return model


def check_gathered(logp: Tensor, *, expected: Tensor, precision: Precision) -> float:
    """Return how far log-probabilities per token of a gathered adapter on its base are from the sharded policy's, on average.

    ValueError where a part must have gone astray.
    """
    gap = float((logp - expected).abs().mean())
    if not gap <= MAX_GATHERED_GAP[precision]:
        raise ValueError(
            f"LoRA export: the gathered adapter is {gap:.3g} nats per token from the policy on its ranks, expected at most "
            f"{MAX_GATHERED_GAP[precision]} in {precision}; the files would be of another model; report it with the model's type"
        )
    return gap


def write_adapter(folder: Path, config: LoraConfig, trained: Mapping[str, Tensor]) -> None:
    """Write an adapter's matrices, by their names in the model, as PEFT reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{n.replace('.default.', '.')}": t.contiguous() for n, t in trained.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = peft_config(config)
    # The last names of the layers that have an adapter: what "all-linear" came to in this architecture.
    described.target_modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in trained})
    described.base_model_name_or_path = None  # where the base lay is no identity
    described.inference_mode = True
    described.save_pretrained(str(folder))


def merge_adapter(
    base: Any, folder: Path, *, measure: Callable[[Any], Tensor], expected: Tensor
) -> tuple[Any, dict[str, float]]:
    """Return the base with a written adapter merged into it, and how far adapter and merged weights are from what was trained.

    `measure` gives log-probabilities per token of some rows under a model, `expected` are those of the trained one. ValueError where
    adapter on base, or merged weights, give others.
    """
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, folder)
        on_base = measure(loaded.base_model.model)
        merged = loaded.merge_and_unload(safe_merge=True)
        found = {"adapter": on_base, "merged": measure(merged)}
    gaps = {name: (logp - expected.to(logp.device)).abs() for name, logp in found.items()}
    far = {name: gap for name, gap in gaps.items() if not (gap.mean() <= MAX_GAP and gap.max() <= ONE_TOKEN * MAX_GAP)}
    if far:
        told = " and ".join(f"{name} {gap.mean():.3g} on average, {gap.max():.3g} at most" for name, gap in far.items())
        raise ValueError(
            f"LoRA export: {told} nats per token from the model that was trained, expected at most {MAX_GAP} and {ONE_TOKEN * MAX_GAP:g}; the "
            "files would be of another model; report it with the model's type"
        )
    return merged, {f"{name}_gap": gap.max().item() for name, gap in gaps.items()}
