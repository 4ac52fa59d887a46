"""Four processes that form a process group of any size up to theirs, once for a whole session: starting one takes seconds."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

NUM_PROCESSES = 4


class Ranks:
    """The processes, and how to run something on some of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = 0
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(NUM_PROCESSES)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=serve, args=(n, pipe[1]), daemon=True) for n, pipe in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a process that dies is an end of file here

    def run(self, work: Callable[..., Any], /, *, size: int, replicas: int = 1, **arguments: Any) -> list[Any]:
        """Return work(world, **arguments) of each of `size` ranks; what a rank raises fails the test."""
        self._calls += 1
        store = self._folder / f"store{self._calls}"
        call = pickle.dumps((work, str(store), size, replicas, arguments))
        waiting = {self._connections[rank]: rank for rank in range(size)}
        results: list[Any] = [None] * size
        errors: dict[int, str] = {}
        for connection in waiting:
            connection.send_bytes(call)
        while waiting:
            for ready in wait(list(waiting)):
                rank = waiting.pop(ready)
                results[rank], error = pickle.loads(ready.recv_bytes())
                if error is not None:
                    errors[rank] = error
        assert not errors, "\n".join(f"rank {rank} of {size}: {error}" for rank, error in errors.items())
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def serve(rank: int, connection: Connection) -> None:
    """Run what comes, for ever."""
    import torch
    import torch.distributed as dist

    from training.distributed import join_world

    torch.set_num_threads(1)
    while True:
        work, store, size, replicas, arguments = pickle.loads(connection.recv_bytes())
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            world = join_world(torch.device("cpu"), replicas=replicas)
            result, error = work(world, **arguments), None
            world.barrier()
        except BaseException:  # noqa: BLE001 - the test that asked is told
            result, error = None, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()  # after a failure the others see their connections close
        connection.send_bytes(pickle.dumps((result, error)))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Give processes that work together."""
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()
