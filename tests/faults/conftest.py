"""One real stack and one finished run of the small recipe, shared by all tests of this folder."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.deployments import register
from infra.settings import Settings
from infra.store import Store, open_store
from tests.faults.command import Command, prefect_at, small


@pytest.fixture(scope="session")
def varflow(stack: Settings, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Give the command on the session's stack, started from an empty folder."""
    return Command(stack, tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def store(stack: Settings) -> Store:
    """Give the store of the session's stack."""
    return open_store(stack)


@pytest.fixture(scope="session")
def done(varflow: Command) -> dict[str, Any]:
    """Give the outcome of the small recipe, run to its end: what it has in common with later runs is there already."""
    return varflow.ask("run", "smoke", *small())


@pytest.fixture
def elsewhere(varflow: Command, stack: Settings, tmp_path: Path) -> Command:
    """Give the command with a prefix of the bucket and a home of its own, on the same servers.

    Experiments keep the place they were made with: give the recipe the prefix for a name.
    """
    changed = {"home": tmp_path / "home", "s3_prefix": f"test_{uuid.uuid4().hex[:8]}"}
    return Command(stack.model_copy(update=changed), varflow.folder)


@pytest.fixture(scope="session")
def deployed(stack: Settings) -> None:
    """See to it that the deployments are there, as `varflow up` does; the sweep's schedule is off, to be started by hand."""
    with prefect_at(stack), get_client(sync_client=True) as client:
        register(stack)
        sweep = client.read_deployment_by_name("sweep/sweep")
        client.update_deployment_schedule(sweep.id, sweep.schedules[0].id, active=False)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a folder on a disk of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs root to mount a disk of one MiB")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
