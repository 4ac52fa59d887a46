"""Where a result came from: code, environment, host."""

import platform
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from infra.fingerprint import digest_file

ROOT = Path(__file__).resolve().parent.parent
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
