"""Identity: canonical JSON, fingerprints of steps, digests of files and folders from outside.

Only values with one deterministic form have a fingerprint. Anything else raises: a `str()` of an unknown object would make
two different things equal, or the same thing different tomorrow.
"""

import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: keys sorted, no spaces, no NaN. Raises TypeError for what has no such form."""
    _check(value, at="value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check(value: Any, *, at: str) -> None:
    # bool, int and str subclasses (enums among them) print differently by Python version: exact types only
    if value is None or type(value) in (bool, int, str):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"{at}: got {value}, expected a finite number: it has no canonical JSON form")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{at}: got the key {key!r} of type {type(key).__name__}, expected text")
            _check(item, at=f"{at}.{key}")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, at=f"{at}[{index}]")
        return
    raise TypeError(f"{at}: got {type(value).__name__}, expected JSON (None, bool, int, float, str, list, dict)")


def fingerprint(identity: Any) -> str:
    """Return 64 hex digits of SHA-256 over the canonical JSON of `identity`."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def diff_identities(old: Any, new: Any, *, at: str = "") -> list[str]:
    """Return one line `path: old -> new` for every field in which two identities differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}):
            lines += diff_identities(old.get(key), new.get(key), at=f"{at}.{key}" if at else key)
        return lines
    return [] if old == new else [f"{at}: {canonical_json(old)} -> {canonical_json(new)}"]


def digest_file(path: Path) -> str:
    """Return 64 hex digits of SHA-256 over the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """Digests of files and folders from outside, remembered by inode, size and change time.

    The change time is set by the kernel and cannot be copied along with the content, so other weights under the same name
    are other weights. The memory is a cache: losing it costs time only.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._memory = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            self._memory.execute("create table if not exists digests (state text primary key, digest text)")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: {error}; make room on its disk, or remove this file: it is a cache") from error

    def of(self, path: Path) -> str:
        """Return the digest of a file, or of a folder's names and files (hidden ones left out).

        Raises FileNotFoundError when there is nothing at `path`, ValueError when a folder holds no file.
        """
        if path.is_file():
            return self._of_file(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: got no file or folder there; check the path, or fetch the source first")
        names = sorted(visible_files(path))
        if not names:
            raise ValueError(f"{path}: got an empty folder, expected files")
        return fingerprint([[name, self._of_file(path / name)] for name in names])

    def _of_file(self, path: Path) -> str:
        state = describe_state(path)
        found = self._memory.execute("select digest from digests where state = ?", (state,)).fetchone()
        if found:
            return str(found[0])
        digest = digest_file(path)
        self._keep([(state, digest)])
        return digest

    def remember(self, taken: Mapping[Path, str]) -> None:
        """Keep the digests of whole files that were taken a moment ago: of those fetched and checked, or sent."""
        self._keep([(describe_state(path), digest) for path, digest in taken.items()])

    def _keep(self, rows: list[tuple[str, str]]) -> None:
        with suppress(sqlite3.OperationalError), self._memory:  # a full disk
            self._memory.execute("begin")  # one transaction: each waits for the disk
            self._memory.executemany("insert or replace into digests values (?, ?)", rows)


def describe_state(path: Path) -> str:
    """Return what changes whenever a file's bytes do, or another file takes its place."""
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def visible_files(folder: Path) -> Iterable[str]:
    """Return the relative names, with forward slashes, of a folder's files; hidden files and folders are left out."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()
