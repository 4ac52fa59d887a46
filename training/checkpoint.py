"""Checkpoints: atomic, complete, safetensors only, and bound to the run they belong to.

A checkpoint is a folder `step-00000012`, written beside its final name and renamed when every byte is on disk, so one that
can be seen is whole. The newest one wins and the older are deleted.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.job import write_json


@dataclass
class Progress:
    """How far a run is. `step` optimiser steps are done; `metrics_bytes` of the metrics file tell of them."""

    step: int = 0
    metrics_bytes: int = 0
    loss: float | None = None  # of the last step that was not skipped
    skipped: int = 0  # steps skipped for a non-finite loss or gradient
    skipped_rows: list[str] = field(default_factory=list)  # row ids of the skipped steps in a row up to now
    skipped_in_row: int = 0
    tokens: int = 0  # through the model, without padding
    flops: int = 0  # useful ones, forward and backward; 0 where nobody counts them
    seconds: float = 0.0  # in steps, over all attempts
    microbatch_tokens: int = 0  # budget of the last step: as asked for, or what the device had room for


def read_rng(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def write_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's random generators into a state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    rng: dict[str, Tensor],
    identity: dict[str, Any],
) -> None:
    """Write a checkpoint below `folder`, then delete the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + ".partial")
    for stale in (partial, final):  # a rerun may reach the same step again
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    save_file(model_tensors(model), partial / "model.safetensors")
    save_file(optimiser_tensors(model, optimiser), partial / "optimiser.safetensors")
    save_file(rng, partial / "rng.safetensors")
    write_json(partial / "state.json", {"progress": dataclasses.asdict(progress), "identity": identity})
    for path in (*partial.iterdir(), partial):
        flush(path)
    partial.rename(final)
    flush(folder)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    identity: dict[str, Any],
    device: torch.device,
) -> Progress:
    """Load the newest checkpoint below `folder` into model, optimiser and generators; a fresh Progress where there is none.

    ValueError for a checkpoint of another run (config or batch plan), with the differing fields, and for a damaged one.
    """
    found = sorted(path for path in folder.glob("step-*") if not path.name.endswith(".partial"))
    if not found:
        return Progress()
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text())
        weights = load_file(newest / "model.safetensors", device=str(device))
        moments = load_file(newest / "optimiser.safetensors", device=str(device))
        rng = load_file(newest / "rng.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {newest}: damaged ({error}); delete it to start over") from error
    check_identity(newest, state["identity"], identity)
    load_tensors(model, weights)
    load_optimiser(model, optimiser, moments)
    write_rng(rng, device)
    return Progress(**state["progress"])


def check_identity(checkpoint: Path, got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint belongs to this run, with a line for each field that differs."""
    keys = sorted(set(got) | set(expected))
    differing = [
        f"{key}: got {got.get(key)!r}, expected {expected.get(key)!r}"
        for key in keys
        if got.get(key) != expected.get(key)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {checkpoint}: it belongs to another run ({'; '.join(differing)}); "
            "give this run another work directory, or delete the checkpoint to start over"
        )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters (tied ones once) and persistent buffers by name."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {
        name: tensor.detach().contiguous() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()
    }


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the model's parameters and buffers, in place."""
    own = model_tensors(model)
    assert own.keys() == tensors.keys(), f"checkpoint and model differ in {sorted(own.keys() ^ tensors.keys())[:5]}"
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name in tensors:
                tensor.copy_(tensors[name])


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as `<parameter>|<kind>`, such as `lm_head.weight|exp_avg`."""
    return {
        f"{name}|{kind}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put stored state into an optimiser that has taken no step yet."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, kind = key.rsplit("|", 1)
        optimiser.state[parameters[name]][kind] = tensor
