"""Pushed batches as a local folder that ingestion reads."""

import uuid
from pathlib import Path

from infra import ledger
from infra.store import Store, digest_bytes


def fetch_snapshot(store: Store, digest: str, *, home: Path) -> Path:
    """Return a folder with the files of a snapshot's batches, named by digest; it appears whole or not at all."""
    folder = home / "snapshots" / digest
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{digest}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    for entry in ledger.read_snapshot(store, digest):
        found = store.get(entry["file"])
        if found is None or digest_bytes(found[0]) != entry["digest"]:
            raise ValueError(f"{store.url(entry['file'])}: the batch's bytes are gone or changed; push the file again")
        name = Path(entry["file"]).name.removeprefix("rows")
        (partial / f"{entry['digest']}{name}").write_bytes(found[0])
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return folder
