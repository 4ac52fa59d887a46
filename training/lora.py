"""LoRA (Hu et al. 2106.09685) through PEFT: small matrices beside every linear layer are trained, the base stays as it is.

The adapter is put into the model itself, so everything else works as with full fine-tuning; at the end it is written on its
own, as PEFT reads it, and merged into the weights, and both are held to what was trained.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import LoraModel, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor

from training.config import LoraConfig

MAX_GAP = 1e-4  # nats per token between what was trained and what is exported


def add_adapter(model: Any, config: LoraConfig) -> None:
    """Put trainable matrices beside every linear layer but the output head, and freeze the rest. They start as no change."""
    inject_adapter_in_model(peft_config(config), model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained), f"LoRA trains {trained[:3]}"


def peft_config(config: LoraConfig) -> PeftLora:
    """Return the adapter as PEFT describes it."""
    return PeftLora(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def export_adapter(
    model: Any, config: LoraConfig, folder: Path, *, measure: Callable[[Any], Tensor], reload_base: Callable[[], Any]
) -> dict[str, float]:
    """Write `folder/adapter`, merge the adapter into `model`, and return how far both are from what was trained.

    `measure` gives log-probabilities per token of some rows under a model, `reload_base` the base as it was. ValueError where
    adapter on base, or merged weights, give other log-probabilities.
    """
    trained = measure(model)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{name}": t.contiguous() for name, t in get_peft_model_state_dict(model).items()}
    save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    described = peft_config(config)
    described.target_modules = adapted_modules(model)
    described.base_model_name_or_path = None  # where the base lay is no identity
    described.inference_mode = True
    described.save_pretrained(str(adapter))
    merge(model)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(reload_base(), adapter)
        found = {"adapter": measure(loaded.base_model.model), "merged": measure(model)}
    gaps = {f"{name}_gap": float((logp - trained).abs().max()) for name, logp in found.items()}
    far = {name: gap for name, gap in gaps.items() if not gap <= MAX_GAP}
    if far:
        raise ValueError(
            f"LoRA export: {far} nats per token from the model that was trained, expected at most {MAX_GAP}; the files would "
            "be of another model; report it with the model's type"
        )
    return gaps


def adapted_modules(model: Any) -> list[str]:
    """Return the last names of the layers that have an adapter: what "all-linear" came to in this architecture."""
    names = {name.rpartition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    return sorted({name.rpartition(".")[2] for name in names})


def merge(model: Any) -> None:
    """Add the adapter to the weights and take it out of the model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge(safe_merge=True)
            parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    assert not any(LoraModel.prefix in name for name, _ in model.named_parameters())
