"""Which weights a model folder holds, by digest. Without torch: whoever supervises a child compares what it read."""

import hashlib
from collections.abc import Callable
from pathlib import Path


def digest_file(path: Path) -> str:
    """Return 64 hex digits of SHA-256 over a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_weights(folder: Path, *, digest: Callable[[Path], str] = digest_file) -> str:
    """Return 64 hex digits of SHA-256 over a model folder's safetensors files, by name; `digest` says what one file's are."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name}\0{digest(path)}\n".encode())
    return total.hexdigest()
