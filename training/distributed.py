"""The ranks of a run: which one this process is, how they share a step, and how they agree.

Each rank is a process with its own device. All know the whole plan; each runs its share of a step's micro-batches, and what
they find is added up, never averaged.
"""

import os
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from training.config import Precision, Runtime

TIMEOUT = timedelta(minutes=10)  # of a rank that waits for another within a step
# Of one that waits for another's files. Checkpoints of 70 billion parameters are 840 GB: 2.3 hours at 100 MB a second.
FILES_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class World:
    """This process among those that train one model together. Alone, nothing is ever sent."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # replicate x shard; None when alone
    files: dist.ProcessGroup | None = None  # all ranks, for waits as long as files take; None when alone
    numbers: dist.ProcessGroup | None = None  # all ranks' CPUs; None where these exchange everything

    @property
    def is_first(self) -> bool:
        """Say whether this is the rank that writes what all have in common."""
        return self.rank == 0

    def share(self, micros: Sequence[list[int]]) -> Iterator[tuple[list[int], bool]]:
        """Yield this rank's micro-batches of a step and whether they count.

        Every rank gets equally many, since sharded parameters are gathered together; what does not count fills up. They are
        dealt in turn, so that those of similar size run at the same time.
        """
        for begin in range(0, len(micros), self.size):
            place = begin + self.rank
            yield (micros[place], True) if place < len(micros) else (micros[-1], False)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return sums over all ranks, in float64; every rank gives as many values and gets the same."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.numbers)
        return [float(value) for value in total.tolist()]

    def union(self, names: Sequence[str], own: Collection[str]) -> list[str]:
        """Return which of some names any rank has among its own; every rank gives the same names and gets the same."""
        counts = self.sum([float(name in own) for name in names])
        return [name for name, count in zip(names, counts, strict=True) if count]

    def any(self, flag: bool) -> bool:
        """Say whether the flag is set on any rank; every rank gets the same answer."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """Return the largest value of any rank; every rank gets the same."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.numbers)
        return float(largest.item())

    def first(self, value: float) -> float:
        """Return the first rank's value on every rank."""
        return self.sum([value if self.is_first else 0.0])[0]

    def autocast(self, precision: Precision) -> torch.autocast:
        """Compute in a precision: weights, gradients and optimiser stay in float32, bfloat16 is what the matrix products run in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == Precision.bfloat16)

    def barrier(self) -> None:
        """Wait until every rank is here, though one of them reads or writes files for up to FILES_TIMEOUT."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(()), group=self.files)


ALONE = World(torch.device("cpu"))


@contextmanager
def open_world(runtime: Runtime, device: torch.device) -> Iterator[World]:
    """Join the ranks that torch's launcher started; without it this process is alone and no process group is made.

    ValueError where there are not as many ranks as the runtime says.
    """
    if not dist.is_torchelastic_launched():
        require_size(1, runtime)
        yield World(device)
        return
    if device.type == "cuda":
        device = own_gpu(dist.get_node_local_rank())
        torch.cuda.set_device(device)
    elif runtime.threads is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // runtime.ranks))
    if runtime.rendezvous is not None:
        os.putenv("GLOO_SOCKET_IFNAME", find_interface(runtime.rendezvous))  # gloo reads it here and now
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    require_size(dist.get_world_size(), runtime)
    yield join_world(device, replicas=runtime.replicas)
    # Only after success: a rank that failed must say so before the others see its connections close.
    dist.destroy_process_group()


def require_size(size: int, runtime: Runtime) -> None:
    """Raise ValueError unless a job runs on as many ranks as it asks for, in replicas of equally many: one alone would train the same
    model, unsharded."""
    if size != runtime.world_size:
        raise ValueError(
            f"runtime.ranks: got {size} ranks, expected {runtime.world_size} ({runtime.nodes} machines of {runtime.ranks}); start the "
            "job with `python -m training JOB.json` on each machine, which starts its ranks itself"
        )
    require_divisor(runtime.replicas, size)


def require_divisor(replicas: int, size: int) -> None:
    """Raise ValueError for ranks that cannot be divided into so many replicas."""
    if size % replicas:
        raise ValueError(
            f"runtime.replicas: got {replicas} for {size} ranks; expected a divisor of the number of ranks"
        )


def find_interface(rendezvous: str) -> str:
    """Return the name of the network interface over which this machine reaches the others, those of the host of `host:port`.

    Gloo would take that of the address which the machine's own name stands for, often loopback.
    """
    host, port = rendezvous.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing
        own = probe.getsockname()[0]
    return next(name for name, found in psutil.net_if_addrs().items() if own in {one.address for one in found})


def own_gpu(local_rank: int) -> torch.device:
    """Return the GPU of a rank of this machine. ValueError where there are fewer GPUs than ranks."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"runtime.ranks: rank {local_rank} of this machine has no GPU, torch sees {count}; expected one for each rank; lower "
            "runtime.ranks"
        )
    return torch.device("cuda", local_rank)


def join_world(device: torch.device, *, replicas: int) -> World:
    """Return this rank of the process group. ValueError where its ranks cannot be divided into so many replicas."""
    rank, size = dist.get_rank(), dist.get_world_size()
    require_divisor(replicas, size)
    mesh = make_mesh(device, size=size, replicas=replicas)
    files = dist.new_group(backend="gloo", timeout=FILES_TIMEOUT)
    numbers = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
    return World(device, rank, size, mesh, files, numbers)


def make_mesh(device: torch.device, *, size: int, replicas: int) -> DeviceMesh:
    """Return all ranks as shard, or as replicate x shard. The groups that torch makes of a mesh would wait half an hour for a rank."""
    if replicas == 1:
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    grid = torch.arange(size).view(replicas, -1)
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=TIMEOUT)[0] for ranks in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def require_sharded(model: nn.Module, world: World) -> None:
    """Assert that this rank holds its part of each parameter and no more, as the mesh divides it; alone, that it holds all whole.

    A whole copy on each rank, as data parallelism has it, would train to the same numbers in as many times the memory.
    """
    mesh = world.mesh if world.size > 1 else None
    placements = (*[Replicate()] * (mesh.ndim - 1), Shard(0)) if mesh is not None else None
    for name, parameter in model.named_parameters():
        got = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else (None, None)
        assert got == (mesh, placements), (
            f"parameter {name}: got {got} as mesh and placements, expected {(mesh, placements)}"
        )
