"""Checkpoints: atomic, complete, safetensors only, and bound to the run they belong to.

A checkpoint is a folder `step-00000012`, written beside its final name and renamed when every byte is on disk, so one that
can be seen is whole; it loses that name before its files are deleted. The newest one wins and the older are deleted.

Weights and optimiser state lie in `tensors/`, files of each rank with the rank's part of every tensor, as torch's
distributed checkpoints have them: any number of ranks reads what any other number wrote.
"""

import dataclasses
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from training.distributed import ALONE, World
from training.job import flush, write_json

FILE_BYTES = 2**30  # about a file of one rank, which is in memory twice while it is written
BLOCK_BYTES = 2**24
PARTIAL = ".partial"
CHECKSUMS = "crc32-"  # with the rank's number, what a rank says of its files


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
    microbatch_tokens_asked: int = 0


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
    world: World = ALONE,
) -> None:
    """Write a checkpoint below `folder`, then delete the older ones. Every rank calls it; the first one publishes.

    One of this step that is there already stays: it was restored, or saved a moment ago, and holds the same.
    """
    final = name_checkpoint(folder, progress.step)
    if world.any(world.is_first and final.exists()):
        return
    partial = name_partial(final)
    if world.is_first:
        for killed in folder.glob(f"*{PARTIAL}"):  # whose room this one may need, and whose name
            shutil.rmtree(killed)
        (partial / "tensors").mkdir(parents=True)
    world.barrier()
    tensors = {name: tensor.contiguous() for name, tensor in model_tensors(model).items()}
    write_tensors(partial / "tensors", tensors | optimiser_tensors(model, optimiser), world)
    if world.is_first:
        save_file(rng, partial / "rng.safetensors")
        state = {"progress": dataclasses.asdict(progress), "identity": identity, "shards": shard_sizes(partial)}
        state["crc32"] = take_checksums(partial)
        write_json(partial / "state.json", state)
        publish(partial, final)
    world.barrier()


def write_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write every rank's part of the tensors to files of its own, on disk when all ranks have; all do it at the same time."""
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), spread_over_files(tensors, limit=FILE_BYTES * world.size), save_distributed=True
    )
    with own_errors():
        dcp.save(dict(tensors), storage_writer=writer, process_group=world.files, no_dist=world.size == 1)
    own = sorted(folder.glob(f"shard-{world.rank + 1:05d}-*"))
    for path in own:  # torch flushes all but the end, which is in a buffer then
        flush(path)
    write_json(folder.parent / f"{CHECKSUMS}{world.rank}.json", {path.name: checksum(path) for path in own})
    world.barrier()


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file: it finds what a disk has changed, and takes a fraction of the time of writing."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def take_checksums(checkpoint: Path) -> dict[str, int]:
    """Return what the ranks have written down of their files of tensors, which is deleted, by name."""
    found: dict[str, int] = {}
    for path in checkpoint.glob(f"{CHECKSUMS}*.json"):
        found |= json.loads(path.read_text())
        path.unlink()
    return found


def spread_over_files(tensors: dict[str, Tensor], *, limit: int) -> dict[str, int]:
    """Return for each tensor the number, from 1, of the file it goes to; one may be above the limit by one tensor."""
    numbers: dict[str, int] = {}
    total = 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + total // limit
        total += tensor.numel() * tensor.element_size()
    return numbers


def shard_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of each file of tensors by name."""
    return {path.name: path.stat().st_size for path in sorted((checkpoint / "tensors").iterdir())}


def publish(partial: Path, final: Path) -> None:
    """Give a checkpoint, whose tensors are on disk, its name once all of it is, and delete the older ones."""
    for path in (partial / "rng.safetensors", partial / "tensors", partial):
        flush(path)
    partial.rename(final)
    flush(final.parent)
    for other in final.parent.iterdir():
        if other != final:
            discard(other)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint: first its name, since one that is half deleted must not be seen."""
    shutil.rmtree(checkpoint.rename(name_partial(checkpoint)))


def name_partial(checkpoint: Path) -> Path:
    """Return where a checkpoint lies while it is written or deleted."""
    return checkpoint.with_name(checkpoint.name + PARTIAL)


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what went wrong on a rank itself, not torch's wrapping of it, which is no Exception and hides a full disk."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one rank needs none
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def restore_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    identity: dict[str, Any],
    world: World = ALONE,
) -> Progress:
    """Load the newest checkpoint below `folder` into model, optimiser and generators; a fresh Progress where there is none.

    Every rank calls it, the first one with the whole identity. ValueError for a checkpoint of another run (config, base or batch
    plan), with the differing fields, and for a damaged one.
    """
    newest = find_newest(folder, world)
    if newest is None:
        return Progress()
    try:
        state = json.loads((newest / "state.json").read_text())
        progress = Progress(**state["progress"])
        if name_checkpoint(folder, progress.step) != newest:
            raise OSError(f"state.json is of step {progress.step}")
        if (sizes := shard_sizes(newest)) != state["shards"]:
            raise OSError(f"files of tensors are {sizes}, expected {state['shards']}")
        # Each rank looks at its share of the files, of which it may then read any part.
        names = sorted(state["crc32"])
        mine = names[world.rank :: world.size]
        own = {name for name in mine if checksum(newest / "tensors" / name) != state["crc32"][name]}
        if changed := world.union(names, own):
            raise OSError(f"what is in {', '.join(changed)} is not what was written")
        rng = load_file(newest / "rng.safetensors")
        if world.is_first:  # which alone may know what belongs to all
            check_identity(newest, state["identity"], identity)
        world.barrier()
        read_tensors(newest / "tensors", model, optimiser, world)
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        why = f"no {error} in state.json" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"checkpoint {newest}: damaged ({why}); delete it to start over") from error
    write_rng(rng, world.device)
    return progress


def find_newest(folder: Path, world: World) -> Path | None:
    """Return the newest checkpoint as the first rank sees it: another's view of a shared disk may lag behind."""
    whole = [path.name for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    step = max((int(name.removeprefix("step-")) for name in whole), default=-1) if world.is_first else 0
    (step_of_first,) = world.sum([step])
    return name_checkpoint(folder, int(step_of_first)) if step_of_first >= 0 else None


def name_checkpoint(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after so many steps."""
    return folder / f"step-{step:08d}"


def read_tensors(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, world: World) -> None:
    """Read this rank's part of weights and optimiser state, in place; the optimiser has taken no step yet."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    own = model_tensors(model)
    names = {name for name in stored if "|" not in name}
    assert own.keys() == names, f"checkpoint and model differ in {sorted(own.keys() ^ names)[:5]}"
    moments = make_optimiser_state(model, {name: stored[name] for name in stored if "|" in name})
    with own_errors():
        dcp.load({**own, **moments}, storage_reader=reader, process_group=world.files, no_dist=world.size == 1)
    parameters = dict(model.named_parameters())
    for key, tensor in moments.items():
        name, kind = key.rsplit("|", 1)
        optimiser.state[parameters[name]][kind] = tensor


def check_identity(checkpoint: Path, got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint belongs to this run, with a line for each field that differs."""
    ours, theirs = flatten(expected), flatten(got)
    differing = [
        f"{name}: got {theirs.get(name, 'nothing')}, expected {ours.get(name, 'nothing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"checkpoint {checkpoint}: it belongs to another run ({'; '.join(differing)}); "
            "give this run another work directory, or delete the checkpoint to start over"
        )


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return what nested dicts hold, as JSON, by dotted name."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): json.dumps(value)}
    return {name: leaf for key, part in value.items() for name, leaf in flatten(part, f"{prefix}{key}.").items()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters (tied ones once) and persistent buffers by name, sharing their memory."""
    persistent = model.state_dict().keys()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor.detach() for name, tensor in {**trained, **buffers}.items()}


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as `<parameter>|<kind>`, such as `lm_head.weight|exp_avg`."""
    return {
        f"{name}|{kind}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for kind, tensor in optimiser.state.get(parameter, {}).items()
    }


def make_optimiser_state(model: nn.Module, stored: dict[str, Any]) -> dict[str, Tensor]:
    """Return room for stored optimiser state: what is as large as its parameter is sharded as that is."""
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for key, described in stored.items():
        assert isinstance(described, TensorStorageMetadata)
        parameter, dtype = parameters[key.rsplit("|", 1)[0]], described.properties.dtype
        if described.size == parameter.shape:
            state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            state[key] = torch.zeros(described.size, dtype=dtype, device=parameter.device)
    return state
