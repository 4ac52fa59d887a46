"""What the stack is: its files, its lock, the words for its state."""

import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from infra.settings import Service, Settings, read_object

SOCKET_PATH_BYTES = 90  # the kernel's limit is 107 (Linux) or 103 (macOS); supervisord appends its pid for a moment
LOCK_SECONDS = 300.0

Progress = Callable[[str], None]


class StackError(Exception):
    """The local stack cannot do what was asked; the message says what, where, got, expected, next."""


@dataclass(frozen=True)
class ServiceStatus:
    """One service: `state` is running, starting, failed, stopped, orphaned or external; `detail` says why it is not healthy."""

    service: Service
    state: str
    healthy: bool
    url: str
    pid: int | None = None
    port: int | None = None
    uptime_seconds: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class StackStatus:
    """All services, the settings that reach them, and which of them this `up` started."""

    settings: Settings
    services: tuple[ServiceStatus, ...]
    started: tuple[Service, ...] = ()

    @property
    def healthy(self) -> bool:
        """Tell whether every service answers."""
        return all(service.healthy for service in self.services)


@dataclass(frozen=True)
class DownReport:
    """What `down` ended: services stopped, names of the flow runs cancelled, leftover processes ended (pid and command)."""

    stopped: tuple[Service, ...]
    cancelled: tuple[str, ...]
    ended: tuple[str, ...]


@contextmanager
def locked(home: Path, *, progress: Progress) -> Iterator[None]:
    """Hold the one lock for starting and stopping this home's stack; the kernel frees it when this process dies."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "stack.lock").open("a+") as lock:
        deadline, told = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StackError(
                        f"{lock.name}: another `varflow up` or `varflow down` has held this lock for {LOCK_SECONDS:.0f} s; "
                        "wait for it or end it, then try again"
                    ) from None
                if not told:
                    progress("waiting for another `varflow up` or `varflow down` of this home")
                    told = True
                time.sleep(0.2)
        yield


def run_folder(home: Path) -> Path:
    """Make and return the private folder of the sockets: `run` in the home, or one below /tmp where that is too deep."""
    folder = home / "run"
    if len(os.fsencode(folder / "supervisor.sock")) > SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
        folder = Path(f"/tmp/varflow-{os.getuid()}-{digest}")
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StackError(f"{folder}: expected a folder of this user with mode 0700; remove it and try again")
    return folder


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def with_credentials(settings: Settings) -> Settings:
    """Return the settings with the credentials of the local S3, generated at the first start and kept in the home."""
    if not settings.is_local("s3") or settings.s3_access_key is not None:
        return settings
    path = settings.home / "credentials.json"
    found = read_object(path)
    if not found:
        found = {"s3_access_key": secrets.token_hex(10), "s3_secret_key": secrets.token_hex(20)}
        write_private(path, json.dumps(found))
    return settings.model_copy(
        update={"s3_access_key": found["s3_access_key"], "s3_secret_key": SecretStr(found["s3_secret_key"])}
    )


def describe(settings: Settings) -> dict[str, Any]:
    """Give what another shell must know to reach this stack, no secrets; a local URL follows from its port."""
    fields = {"s3_bucket", "s3_prefix", "s3_region", "s3_port", "prefect_port", "mlflow_port", "work_pool"}
    described = settings.model_dump(include=fields)
    for service, field in (("s3", "s3_endpoint"), ("prefect", "prefect_api_url"), ("mlflow", "mlflow_tracking_uri")):
        if not settings.is_local(service):  # type: ignore[arg-type]
            described[field] = getattr(settings, field) or "aws"
    return described
