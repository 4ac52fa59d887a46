"""A real stack for the tests, in a home and on ports of its own: SeaweedFS alone (`s3`), or all of it (`stack`).

Both are one stack, started once a session: `stack` adds to what `s3` started.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.settings import GRPC_OFFSET, Settings, read_settings
from infra.stack import down, up
from infra.stack.processes import is_taken

WEED_PORTS = 4


def find_free_ports(first: int = 20_000, last: int = 32_000) -> dict[str, int]:
    """Return ports for a stack below the range from which the kernel picks a client's, at a random place of it."""
    for _ in range(200):
        base = random.randrange(first, last)
        s3 = range(base, base + WEED_PORTS)
        others = (base + WEED_PORTS, base + WEED_PORTS + 1)
        if not any(is_taken(port) for port in (*s3, *(port + GRPC_OFFSET for port in s3), *others)):
            return {"s3_port": base, "prefect_port": others[0], "mlflow_port": others[1]}
    raise AssertionError(f"no free ports between {first} and {last}")


def make_settings(home: Path) -> Settings:
    """Return the settings of a stack of its own that no other stack on this machine meets."""
    return read_settings(home=home, **find_free_ports())


@pytest.fixture(scope="session")
def stack_home() -> Iterator[Settings]:
    """Give the settings of the session's stack, nothing started yet; it is stopped at the end, also after failures."""
    with tempfile.TemporaryDirectory(prefix="varflow-tests-", ignore_cleanup_errors=True) as folder:
        settings = make_settings(Path(folder) / "home")
        try:
            yield settings
        finally:
            down(settings)


@pytest.fixture(scope="session")
def s3(stack_home: Settings) -> Settings:
    """Give the settings, credentials included, of a running SeaweedFS with its bucket (3 s)."""
    return up(stack_home, services=("s3",)).settings


@pytest.fixture(scope="session")
def stack(stack_home: Settings) -> Settings:
    """Give the settings of a running stack: S3, Prefect, MLflow and a worker (30 s). The environment is left alone."""
    return up(stack_home).settings
