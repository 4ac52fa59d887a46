"""Hugging Face hub repositories, each pinned by a commit: fetched, checked, kept in a folder or in the store.

A mirror is a folder, or the store below `mirror/`. In it a repository is `models/ORG/NAME/COMMIT/` or `datasets/ORG/NAME/COMMIT/`,
with its manifest: in a folder the hidden file `.mirror.json` beside the files, in the store `COMMIT.json`, written last. A folder
appears by one rename, so it is there whole or not at all; the files that a killed fetch had finished are in `.COMMIT.partial/`, and
the next one fetches the others. The manifest is hidden so that a repository has the same digest wherever it came from, and whenever.

Nothing of a repository is run, here or later: code and pickled weights are not fetched.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict

from infra.fingerprint import Digests, digest_file, fingerprint, visible_files
from infra.models import locked
from infra.store import PreconditionFailed, Store, StoredFile

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

Kind = Literal["model", "dataset"]
Progress = Callable[[str], None]

MANIFEST = ".mirror.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
HIDDEN = (".*", "*/.*")  # what no digest of ours sees
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pickle", "*.pkl", "*.joblib")
CODE = ("*.py",)
OTHER_WEIGHTS = (
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "*.ot",
    "*.mlmodel",
    "*.gguf",
)  # the same ones again
DATA = (
    "*.parquet",
    "*.json",
    "*.jsonl",
    "*.csv",
    "*.tsv",
    "*.txt",
    "*.arrow",
    "*.gz",
    "*.zst",
    "*.xz",
    "*.zip",
)  # as `datasets` reads
LEFT_OUT: dict[Kind, tuple[str, ...]] = {"model": PICKLED + CODE + OTHER_WEIGHTS, "dataset": PICKLED + CODE}


class Manifest(BaseModel):
    """What a mirrored repository is: enough to tell whether a copy of it is whole and unchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    repository: str  # ORG/NAME, as it was asked for
    commit: str
    revision: str  # what was asked for: a branch, a tag or the commit
    licence: str | None  # as the card's metadata state it
    hub: str  # where it came from
    mirrored: str  # ISO 8601, UTC
    files: tuple[StoredFile, ...]
    left_out: tuple[str, ...]  # files of the repository that were not fetched

    @property
    def name(self) -> str:
        """Where it lies below the root of a mirror."""
        return place(self.kind, self.repository, self.commit)

    @property
    def reference(self) -> str:
        """How configs and the command line name the copy in the store."""
        return f"mirror:{'datasets/' if self.kind == 'dataset' else ''}{self.repository}@{self.commit}"


@dataclass(frozen=True)
class Pin:
    """A repository whose revision has been resolved to a commit; nothing of it is fetched yet."""

    kind: Kind
    repository: str
    revision: str
    commit: str
    licence: str | None
    wanted: "tuple[RepoFile, ...]"
    left_out: tuple[str, ...]


def place(kind: Kind, repository: str, commit: str) -> str:
    """Return where a repository lies below the root of a mirror."""
    return f"{kind}s/{repository}/{commit}"


# --- from the hub ---


def pin(repositories: Sequence[str], *, kind: Kind, revision: str, endpoint: str | None) -> list[Pin]:
    """Resolve a revision of repositories to commits and list what is to be fetched. Raises ValueError naming all that cannot be."""
    pins, faults = [], []
    for repository in dict.fromkeys(repositories):
        try:
            pins.append(_pin(repository, kind=kind, revision=revision, endpoint=endpoint))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults) + ("; nothing was fetched" if len(repositories) > 1 else ""))
    return pins


def _pin(repository: str, *, kind: Kind, revision: str, endpoint: str | None) -> Pin:
    from huggingface_hub import HfApi, RepoFile

    api = HfApi(endpoint=endpoint)
    with explained(f"{kind} {repository} at {revision}", where=api.endpoint):
        info = api.repo_info(repository, repo_type=kind, revision=revision)
        assert info.sha, "the hub names the commit of every revision"
        listed = api.list_repo_tree(repository, recursive=True, revision=info.sha, repo_type=kind)
        files = [file for file in listed if isinstance(file, RepoFile) and not matches(file.path, HIDDEN)]
    wanted = tuple(file for file in files if not matches(file.path, LEFT_OUT[kind]))
    left_out = tuple(file.path for file in files if matches(file.path, LEFT_OUT[kind]))
    useful = ("*.safetensors",) if kind == "model" else DATA
    if not any(matches(file.path, useful) for file in wanted):
        lacks = "no safetensors" if kind == "model" else "no data files, so it would have to run its own code"
        advice = (
            "take one with safetensors"
            if kind == "model"
            else "try --revision refs/convert/parquet, which the hub makes of many"
        )
        raise ValueError(
            f"{kind} {repository} at {info.sha}: got {lacks} ({', '.join(left_out[:5]) or 'no weights or code either'}); "
            f"neither pickles nor code are taken from a hub; {advice}"
        )
    return Pin(kind, repository, revision, info.sha, _licence(getattr(info, "card_data", None)), wanted, left_out)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a file's name fits one of some patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _licence(card: Any) -> str | None:
    stated = (card or {}).get("license")
    return ", ".join(stated) if isinstance(stated, list) else stated


def fetch(
    pinned: Pin, *, root: Path, endpoint: str | None, digests: Digests, progress: Progress
) -> tuple[Manifest, bool]:
    """Bring a repository into the mirror `root`; return its manifest and whether anything had to be fetched.

    Each file is held to the digest that the hub lists. Raises ValueError where a file is another than that, where the hub fails,
    and where a copy that is there already was changed.
    """
    folder = root / place(pinned.kind, pinned.repository, pinned.commit)
    folder.parent.mkdir(parents=True, exist_ok=True)
    title = f"{pinned.repository}@{pinned.commit[:12]}"
    with locked(
        folder.with_name(f".{folder.name}.lock"), waiting=lambda: progress(f"{title}: waiting for another fetch")
    ):
        if folder.is_dir():
            return check_copy(folder, digests=digests), False
        size = sum(file.size for file in pinned.wanted)
        progress(f"{title}: {len(pinned.wanted)} files, {size / 1e6:,.1f} MB")
        partial = folder.with_name(f".{folder.name}.partial")
        names = [file.path for file in pinned.wanted]
        download(pinned.repository, pinned.commit, kind=pinned.kind, endpoint=endpoint, into=partial, names=names)
        manifest = Manifest(
            kind=pinned.kind,
            repository=pinned.repository,
            commit=pinned.commit,
            revision=pinned.revision,
            licence=pinned.licence,
            hub=endpoint or _default_hub(),
            mirrored=datetime.now(UTC).isoformat(timespec="seconds"),
            files=tuple(
                _verify(file, partial, title=title) for file in sorted(pinned.wanted, key=lambda file: file.path)
            ),
            left_out=pinned.left_out,
        )
        write_manifest(manifest, partial)
        shutil.rmtree(partial / ".cache")  # what the library keeps for going on
        partial.rename(folder)
    return manifest, True


def download(
    repository: str,
    commit: str,
    *,
    kind: Kind,
    endpoint: str | None,
    into: Path | None = None,
    names: list[str] | None = None,
) -> Path:
    """Return the folder of a repository at a commit: the library's cache, or `into` with the named files. What is there stays."""
    from huggingface_hub import snapshot_download

    only: dict[str, Any] = {"ignore_patterns": list(LEFT_OUT[kind])}
    if into is not None:  # with no look at the cache of this user, whose files nobody has checked
        only = {
            "allow_patterns": [re.sub(r"([*?[])", r"[\1]", name) for name in names or []],
            "local_dir": into,
            "cache_dir": into / ".cache",
        }
    with explained(f"{kind} {repository} at {commit}", where=endpoint or _default_hub()):
        return Path(snapshot_download(repository, revision=commit, repo_type=kind, endpoint=endpoint, **only))


def find_cached(repository: str, commit: str, *, kind: Kind) -> Path | None:
    """Return the folder of a repository in the library's cache; None where it is not there. Asks no hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=commit, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def explained(what: str, *, where: str) -> Iterator[None]:
    """Turn a failure of the hub into a ValueError that says what to do; a failure of this machine's disk stays what it is."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    # the errors of its HTTP library, whichever that is, and OSError
    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        yield
    except failures as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        if isinstance(error, GatedRepoError):
            advice = f"it is gated: accept its terms on {where}, and set HF_TOKEN to a token of that account"
        else:
            advice = "check name, commit and network, or give a local folder"
        raise ValueError(f"{what}: the hub {where} did not give it ({type(error).__name__}); {advice}") from error


def _default_hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _verify(file: "RepoFile", folder: Path, *, title: str) -> StoredFile:
    """Return the entry of a fetched file whose bytes are the listed ones; another file is removed, to be fetched again."""
    path = folder / file.path
    found = digest_file(path)
    got, expected = (found, file.lfs.sha256) if file.lfs else (_digest_blob(path), file.blob_id)
    if got != expected:
        path.unlink()
        raise ValueError(
            f"{title}: {file.path} has the digest {got}, the hub lists {expected}; it was removed: run the same again to fetch it anew"
        )
    return StoredFile(file.path, path.stat().st_size, found)


def _digest_blob(path: Path) -> str:
    """Return git's name of a file: SHA-1 over a header and the bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# --- copies ---


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Put the manifest beside the files."""
    (folder / MANIFEST).write_text(dump(manifest))


def dump(manifest: Manifest) -> str:
    """Return the manifest as JSON text."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1)


def find_copies(folder: Path) -> list[Path]:
    """Return the mirrored repositories in a folder: itself, or those of a mirror."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = [
        path
        for kind in ("models", "datasets")
        for depth in ("*/*", "*/*/*")
        for path in folder.glob(f"{kind}/{depth}/{MANIFEST}")
    ]
    return sorted(path.parent for path in found if COMMIT.fullmatch(path.parent.name))


def check_copy(folder: Path, *, digests: Digests) -> Manifest:
    """Return the manifest of a copy whose files are all there and the recorded ones. Raises ValueError listing all that are not."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: got a folder without {MANIFEST}, expected a mirrored repository; move it away and mirror it again"
        )
    manifest = Manifest.model_validate_json(path.read_bytes())
    there = set(visible_files(folder))
    faults = [f"{file.name}: not there" for file in manifest.files if file.name not in there]
    faults += [f"{name}: not in the manifest" for name in sorted(there - {file.name for file in manifest.files})]
    for file in manifest.files:
        if file.name in there and (got := digests.of(folder / file.name)) != file.sha256:
            faults.append(f"{file.name}: got SHA-256 {got}, expected {file.sha256}")
    if faults:
        lines = "\n  ".join(faults)
        raise ValueError(
            f"{folder}: {len(faults)} files are not those that were mirrored of {manifest.repository}@{manifest.commit}:\n  {lines}\n"
            "remove the folder and mirror the repository again, or take the changed folder under another name and without its "
            f"{MANIFEST}"
        )
    return manifest


# --- in the store ---


def keep(store: Store, folder: Path, manifest: Manifest) -> bool:
    """Put a checked copy into the store, manifest last; return False where it is there already."""
    name = f"mirror/{manifest.name}"
    found = read_stored(store, kind=manifest.kind, repository=manifest.repository, commit=manifest.commit)
    if found and not store.missing_files(name, found.files):
        return False
    store.upload_folder(folder, name)
    with suppress(PreconditionFailed):  # of the same files, by another process or before some were deleted
        store.put(f"{name}.json", dump(manifest).encode(), create=True)
    return True


def read_stored(store: Store, *, kind: Kind, repository: str, commit: str) -> Manifest | None:
    """Return the manifest of a repository in the store, None where it is not there."""
    found = store.get(f"mirror/{place(kind, repository, commit)}.json")
    return Manifest.model_validate_json(found[0]) if found else None


def list_stored(store: Store) -> list[str]:
    """Return the references of all repositories in the store."""
    names = [item.name.removeprefix("mirror/") for item in store.scan("mirror")]
    found = [re.fullmatch(r"(model|dataset)s/(.+)/([0-9a-f]{40})\.json", name) for name in names]
    return [f"mirror:{'datasets/' if one[1] == 'dataset' else ''}{one[2]}@{one[3]}" for one in found if one]


def open_copy(reference: str, *, store: Store, home: Path) -> Path:
    """Return the local folder of `[datasets/]ORG/NAME@COMMIT`, from the store the first time; `check_copy` is the caller's."""
    kind, repository, commit = parse(reference, scheme="mirror")
    folder = home / "mirror" / place(kind, repository, commit)
    if not folder.is_dir():
        manifest = read_stored(store, kind=kind, repository=repository, commit=commit)
        if manifest is None:
            raise ValueError(
                f"mirror:{reference}: not in {store.url('mirror')}; expected one of {', '.join(list_stored(store)) or '(it is empty)'}; "
                f"`varflow mirror {kind}s {repository} --revision {commit}` puts it there, on a machine that reaches the hub"
            )
        lacking = store.missing_files(f"mirror/{manifest.name}", manifest.files)
        if lacking:
            lines = "\n  ".join(lacking)
            raise ValueError(
                f"mirror:{reference}: {len(lacking)} files are not in {store.url(f'mirror/{manifest.name}')}, or not in their size:\n  {lines}\n"
                f"run `varflow mirror {kind}s {repository} --revision {commit}` again"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            store.download_folder(f"mirror/{manifest.name}", list(manifest.files), partial)
            write_manifest(manifest, partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process brought the same
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def open_datasets(references: str, *, store: Store, home: Path) -> Path:
    """Return a mirror of exactly the data sets `ORG/NAME@COMMIT,ORG/NAME@COMMIT...`, made of links to their local copies."""
    names = sorted({f"datasets/{one.strip().removeprefix('datasets/')}" for one in references.split(",")})
    folders = [open_copy(name, store=store, home=home) for name in names]
    view = home / "mirror" / "views" / fingerprint(names)[:32]
    for folder in folders:
        link = view / folder.relative_to(home / "mirror")
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(folder, target_is_directory=True)
    return view


def parse(reference: str, *, scheme: str) -> tuple[Kind, str, str]:
    """Return (kind, repository, commit) of `[datasets/]ORG/NAME@COMMIT`. Raises ValueError where the commit is none."""
    repository, _, commit = reference.partition("@")
    if not COMMIT.fullmatch(commit):
        raise ValueError(
            f"{scheme}:{reference}: got the revision {commit or 'none'!r}, expected a commit of 40 hex digits after @; a branch "
            "name means something else tomorrow"
        )
    return ("dataset" if repository.startswith("datasets/") else "model"), repository.removeprefix("datasets/"), commit
