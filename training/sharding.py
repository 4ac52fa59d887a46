"""A policy sharded over ranks with FSDP2: parameters, gradients and optimiser state are a part on each, gathered in use.

While it trains no rank holds the whole model: it is made without memory, sharded, and each rank reads its part from the files. To write it,
the first rank puts it together in its machine's memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from training.checkpoint import own_errors
from training.config import LoraConfig, Precision, Runtime
from training.distributed import World
from training.logprobs import Policy
from training.lora import add_adapter, draw_matrices
from training.model import (
    LOCAL,
    find_layers,
    list_stored,
    load_tokenizer,
    prepare_layers,
    prepare_model,
    refuse_two,
    refuse_unused,
)

COMPARED_ROWS = 4096  # of a matrix, at a time


def load_sharded_policy(
    folder: Path,
    world: World,
    *,
    precision: Precision,
    lora: LoraConfig | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> tuple[Policy, Any]:
    """Return (policy, tokenizer) as `load_policy` does, in float32, with this rank's part of the weights.

    `precision` is that of the matrix products to come, `runtime` says how layers train; an adapter of `lora` begins with what
    `seed` draws. ValueError as `load_policy`, and for files whose tensors have other names than the model's own.
    """
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    policy = Policy(prepare_model(model, tokenizer, folder).eval())
    if lora is not None:
        add_adapter(policy.model, lora)
    if runtime is not None:
        prepare_layers(policy.model, runtime, device=world.device)
    drawn = draw_matrices(policy.model, seed) if lora is not None else {}
    shard_and_read(policy, folder, world, precision=precision, drawn=drawn)
    return policy, tokenizer


def shard_and_read(
    policy: Policy, folder: Path, world: World, *, precision: Precision, drawn: Mapping[str, Tensor] | None = None
) -> None:
    """Shard a model that has no memory and give it this rank's part of a folder's tensors.

    `drawn` are whole tensors, by their names in the model, for those that the folder lacks.
    """
    shard_policy(policy, world, precision=precision)
    allocate(policy, world.device)
    read_weights(policy.model, folder, world, drawn=drawn or {})


@torch.no_grad()
def fill(model: Any, whole: Mapping[str, Tensor]) -> None:
    """Give parameters this rank's part of whole tensors, which every rank has."""
    parameters = dict(model.named_parameters())
    for name, tensor in whole.items():
        own = parameters[name]
        own.copy_(distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None))


def shard_policy(policy: Policy, world: World, *, precision: Precision) -> None:
    """Shard each decoder layer, and what is around them (embedding, last norm, output head, tied or not) as one part."""
    # Inputs and what is around the layers stay float32, as they do on one rank: autocast alone decides what is narrow.
    narrow = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in find_layers(policy.model):
        fully_shard(
            layer, mesh=world.mesh, mp_policy=narrow if precision == Precision.bfloat16 else MixedPrecisionPolicy()
        )
    fully_shard(policy, mesh=world.mesh)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum over ranks: shares of a loss add up
            module.set_force_sum_reduction_for_comms(True)


def as_layers(world: World, *, precision: Precision) -> torch.autocast:
    """Return what a pass outside of training runs under: sharded layers are gathered in the precision of the matrix products,
    so what is around them has to follow. One rank's model stays as it is."""
    return world.autocast(precision if world.size > 1 else Precision.float32)


def reshard(policy: nn.Module) -> None:
    """Let go of what a forward pass without a backward one has left gathered: optimiser and files see parts."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def allocate(policy: Policy, device: torch.device) -> None:
    """Give parameters that have no memory theirs, uninitialised; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    for name, buffer in policy.named_buffers():
        buffer.copy_(buffers[name])
    policy.model.tie_weights()  # to_empty has made two parameters of a tied one


def read_weights(model: Any, folder: Path, world: World, *, drawn: Mapping[str, Tensor]) -> None:
    """Read this rank's part of a model's tensors from safetensors files, or take it of what is drawn for those they lack.

    ValueError for tensors that are in neither, for one that is stored twice and differs, and for a file that has no place in the model.
    """
    stored = list_stored(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = name.replace(".base_layer.", ".")
        # A tied tensor is stored under one of its names; a base model's files leave out the prefix of the base.
        names.setdefault(tensor, []).extend([plain, plain.removeprefix(f"{model.base_model_prefix}.")])
    copies = {tensor: [name for name in dict.fromkeys(known) if name in stored] for tensor, known in names.items()}
    if not all(are_same(folder, several) for several in copies.values() if len(several) > 1):
        refuse_two(folder)
    found = {tensor: next(iter(several), None) for tensor, several in copies.items()}
    lacking = {names[tensor][0] for tensor, name in found.items() if name is None}
    missing = sorted(lacking - drawn.keys())
    if missing:
        raise ValueError(
            f"model {folder}: {len(missing)} tensors of {model.config.model_type} are not in its files under their names (first: "
            f"{missing[0]}); expected one for each tensor; load it with this transformers and save it by "
            "save_pretrained(folder, save_original_format=False), or set runtime.ranks to 1"
        )
    refuse_unused(stored - {name for several in names.values() for name in several}, model, folder)
    with own_errors():
        dcp.load(
            {name: tensor.detach() for tensor, name in found.items() if name},
            storage_reader=reader,
            process_group=world.files,
        )
    fill(model, {name: drawn[name] for name in lacking})


def are_same(folder: Path, names: Sequence[str]) -> bool:
    """Return whether tensors of safetensors files are equal, read a part at a time."""
    files: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)
    first, *others = (files[name].get_slice(name) for name in names)
    parts = [slice(begin, begin + COMPARED_ROWS) for begin in range(0, first.get_shape()[0], COMPARED_ROWS)]
    return all(
        other.get_shape() == first.get_shape() and all(torch.equal(first[part], other[part]) for part in parts)
        for other in others
    )


def gather_weights(model: nn.Module, world: World, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the whole state dict on the first rank, tensor by tensor, in the CPU's memory; an empty one on the others.

    With `trained_only` it is the parameters that training changes.
    """
    whole: dict[str, Tensor] = {}
    gathered: dict[Tensor, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        if tensor not in gathered:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            # No more than one ahead of the rank that copies them, which may take longer than TIMEOUT.
            if full.is_cuda and not world.is_first:
                torch.cuda.current_stream().synchronize()
            gathered[tensor] = full.detach().cpu() if world.is_first else full.new_empty(0)
        whole[name] = gathered[tensor]  # tied ones stay one, as what saves them expects
    return whole if world.is_first else {}
