"""Where a result came from: code, environment, host, process."""

import getpass
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from infra.fingerprint import digest_file

ROOT = Path(__file__).resolve().parent.parent
CLOCK_SECONDS = 10.0  # by which the start of a process may seem to move when the clock is set
PACKAGES = ("torch", "transformers", "lm-eval", "prefect", "mlflow", "pyarrow", "numpy")


@cache
def describe() -> dict[str, Any]:
    """Return commit, whether the tree was changed, digest of the pinned environment, versions and host."""
    lock = ROOT / "constraints.txt"
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "lock_sha256": digest_file(lock) if lock.is_file() else "",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv[:3])),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def name_process() -> dict[str, Any]:
    """Return host, pid and start (unix seconds) of this process. A pid alone is given again, soon in a container."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def name_user() -> str:
    """Return user@host of this process; the number of a user who has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def is_gone(process: Mapping[str, Any]) -> bool:
    """Tell whether a named process of this host has ended. Of another host's nothing is known: False."""
    if process["host"] != socket.gethostname():
        return False
    try:
        found = psutil.Process(process["pid"])
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - process["started"]) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def _git(*words: str) -> str:
    """Return git's answer about the project's own tree; empty where it is installed without one."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
