"""Records: the commit of a step, and so the only proof that its artifact exists.

The files go first, under a prefix that only this attempt writes; then the record is put where none was. An artifact is found
when its record is there with every file the record names.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from infra.fingerprint import diff_identities, fingerprint
from infra.store import PreconditionFailed, Store, StoredFile


class Given(BaseModel):
    """What a step really read as one of its inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # step/fingerprint, or the reference of a source as somebody wrote it
    digest: str  # of names and bytes: `digest_files` of an artifact, infra.fingerprint.Digests of a source


class Record(BaseModel):
    """What was made, of what, by whom, at what cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    version: int
    fingerprint: str
    identity: dict[str, Any]  # the very payload that was hashed
    inputs: dict[str, str]  # name -> fingerprint of a step's artifact, or digest of a source
    given: dict[str, Given] = {}  # by the same names; a fingerprint says what was asked for, this what was there
    attempt: str  # hex; who wrote this
    prefix: str  # name in the store below which the files lie
    files: tuple[StoredFile, ...]
    summary: dict[str, Any]
    provenance: dict[str, Any]
    cost: dict[str, float]
    created: str  # ISO 8601, UTC
    mlflow_run: str
    prefect_run: str

    @property
    def ref(self) -> str:
        """`step/fingerprint`, as the command line takes it."""
        return f"{self.step}/{self.fingerprint}"


def digest_files(record: Record) -> str:
    """Return 64 hex digits over names and bytes of an artifact's files: what `Digests.of` says of them as a folder."""
    return fingerprint([[file.name, file.sha256] for file in sorted(record.files, key=lambda file: file.name)])


def record_name(step: str, fingerprint: str) -> str:
    """Return where a record lies in the store."""
    return f"records/{step}/{fingerprint}.json"


def read_record(store: Store, *, step: str, fingerprint: str) -> tuple[Record, str] | None:
    """Return (record, etag), None where there is none."""
    found = store.get(record_name(step, fingerprint))
    if found is None:
        return None
    return Record.model_validate_json(found[0]), found[1]


def find(store: Store, *, step: str, fingerprint: str) -> Record | None:
    """Return the record of a finished step when every file it names is there in full; None otherwise."""
    found = read_record(store, step=step, fingerprint=fingerprint)
    return found[0] if found and not missing_files(store, found[0]) else None


def missing_files(store: Store, record: Record) -> list[str]:
    """Return the names of a record's files that are not in the store, or not in their recorded size."""
    return store.missing_files(record.prefix, record.files)


def commit(store: Store, record: Record) -> Record:
    """Make an attempt the artifact of its fingerprint, and return the record that holds: this one, or the winner's.

    Raises ValueError when another identity stands under the same fingerprint.
    """
    assert record.fingerprint == fingerprint(record.identity), "a record holds the payload that was hashed"
    name, data = record_name(record.step, record.fingerprint), dump(record)
    try:
        store.put(name, data, create=True)
        return record
    except PreconditionFailed:
        pass
    found = read_record(store, step=record.step, fingerprint=record.fingerprint)
    assert found, "records are never deleted while steps run"
    winner, etag = found
    if is_same_attempt(winner, record):  # a retry after a lost answer met its own write
        return winner
    if winner.identity != record.identity:
        lines = "\n  ".join(diff_identities(winner.identity, record.identity))
        raise ValueError(f"{store.url(name)}: another identity has this fingerprint:\n  {lines}")
    if missing_files(store, winner):  # its files are gone: this attempt takes its place
        store.put(name, data, replace=etag)
        return record
    return winner


def is_same_attempt(one: Record, other: Record) -> bool:
    """Tell whether two records are of one commit: an attempt that goes on after a restart writes below another prefix."""
    return (one.attempt, one.prefix) == (other.attempt, other.prefix)


def dump(record: Record) -> bytes:
    """Return the record's JSON text."""
    return json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False).encode()


def iterate(store: Store, step: str = "") -> Iterator[Record]:
    """Yield every record of the store, or of one kind of step."""
    for item in store.scan(f"records/{step}" if step else "records"):
        found = store.get(item.name)
        if found:
            yield Record.model_validate_json(found[0])


def resolve(store: Store, ref: str) -> Record:
    """Return the record that a reference names: `step/fingerprint`, or any unambiguous start of a fingerprint.

    Raises ValueError when none or several match.
    """
    step, _, start = ref.rpartition("/")
    names = [item.name for item in store.scan(f"records/{step}" if step else "records")]
    matches = [name for name in names if name.rsplit("/", 1)[1].startswith(start)]
    if not start or len(matches) != 1:
        raise ValueError(
            f"reference {ref!r}: got {len(matches)} records that match, expected one; write step/fingerprint, "
            "as `varflow run --dry-run` prints it" + "".join(f"\n  {name}" for name in matches[:5])
        )
    found = store.get(matches[0])
    assert found
    return Record.model_validate_json(found[0])
