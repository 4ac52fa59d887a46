"""Where artifacts lie on this machine: one folder for each attempt, written by its step and found under its record."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.fingerprint import Digests
from infra.records import Record, digest_files
from infra.settings import Settings
from infra.store import Store, StoredFile

DIGESTS_FILE = "digests.sqlite"


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Hold the one lock of a work folder on this machine; yields its descriptor for a child to keep it alive with.

    The kernel drops the lock when the last process that holds the descriptor is gone, so nothing can be left locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def place_output(work_folder: Path, *, home: Path) -> Path:
    """Return where a step writes: the folder of its attempt, to which `output` in the work folder points.

    It is the artifact's place from the start, so that the next step reads there while the files are still on their way to
    the store. An attempt that ended before its record goes on in the same folder.
    """
    pointer = work_folder / "output"
    if not pointer.is_symlink():
        folder = home / "artifacts" / uuid.uuid4().hex
        folder.parent.mkdir(parents=True, exist_ok=True)
        if pointer.exists():  # of a version that moved the files here at the end
            pointer.rename(folder)
        pointer.symlink_to(os.path.relpath(folder, work_folder))
    folder = pointer.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_artifact(store: Store, record: Record, *, home: Path) -> Path:
    """Return the local folder of an artifact, fetched the first time, and each time held to its record by digest.

    Files that did not change since their digest was taken are not read again. Raises ValueError for a copy that was changed.
    """
    folder, digests = home / "artifacts" / record.attempt, Digests(home / DIGESTS_FILE)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.download_folder(record.prefix, list(record.files), folder)
        remember_files(folder, record.files, digests=digests)
    got, expected = digests.of(folder), digest_files(record)
    if got != expected:
        raise ValueError(
            f"{record.step}/{record.fingerprint[:12]}: its copy {folder} has digest {got[:12]}, expected {expected[:12]}, that of its "
            "record: it was changed on this machine; remove that folder, and the same command fetches it again"
        )
    return folder


def remember_files(folder: Path, files: Sequence[StoredFile], *, digests: Digests) -> None:
    """Keep the digests of files that the store has just taken or given."""
    digests.remember({folder / file.name: file.sha256 for file in files})


def count_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_summary(folder: Path) -> dict[str, Any]:
    """Return an artifact's summary, empty where its step writes none."""
    path = folder / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def open_digests(settings: Settings) -> Digests:
    """Return the memory of digests in the home."""
    return Digests(settings.home / DIGESTS_FILE)
