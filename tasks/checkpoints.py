"""Checkpoints of a training in the store while it goes on, so that another machine can go on from there.

`checkpoints/<step>/<fingerprint>/step-00000012.json` is written when every file that it names is there: what has no such
manifest is not seen. Training itself knows no store; it leaves complete checkpoints in its work folder, where this process
finds them. They are deleted once the step is recorded.
"""

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.store import FileChanged, Store, StoredFile, StoreError
from tasks.step import Planned
from training.job import ANSWERS_FILE, METRICS_FILE

logger = logging.getLogger("varflow.checkpoints")
ROOT = "checkpoints"
KEPT_OF = (
    "train",
    "reward_model",
)  # steps that make some; an earlier attempt, on another machine too, may have stored them
BESIDE = (METRICS_FILE, ANSWERS_FILE)  # of the output: what the steps up to the checkpoint have told
LAST_SECONDS = (
    3.0  # for an upload under way when the child has ended; after a failure this process may be killed 5 s later
)


class StoredCheckpoints:
    """The checkpoints of one attempt. As a context it fetches the newest, then uploads when called, one at a time.

    The `stored_checkpoints` newest are kept, and the last uploaded; with 0 nothing is fetched or uploaded. What fails here costs a
    checkpoint, not the training.
    """

    def __init__(self, store: Store, planned: Planned, folder: Path) -> None:
        self._store, self._root, self._folder = store, name_root(planned), folder
        self._keep = planned.runtime.stored_checkpoints
        self._uploaded = -1  # step of the last one that went up, or that cannot
        self._upload: threading.Thread | None = None
        self._place = ""  # where it goes
        self._done = False  # the step needs no checkpoint any more

    def __enter__(self) -> Self:
        if self._keep:
            self._fetch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._upload is not None:
            if kind is None:  # it would be deleted next; what still comes behind that has no manifest
                self._done = True
                self._store.stop_uploads(self._place)
            self._upload.join(LAST_SECONDS)
        shutil.rmtree(self._folder / "upload", ignore_errors=True)

    def __call__(self) -> None:
        """Begin to upload the newest checkpoint, where there is a new one and no other is on its way."""
        if not self._keep or (self._upload is not None and self._upload.is_alive()):
            return
        step, newest = find_newest(self._folder)
        if newest is None or step <= self._uploaded:
            return
        try:
            staged = stage(newest, self._folder)
        except OSError as error:  # a disk without second names, or without room
            logger.warning("%s was not stored: %s", newest.name, error)
            self._uploaded = step
            return
        if staged is not None:
            self._uploaded = step
            self._place = f"{self._root}/{staged.name}-{uuid.uuid4().hex[:8]}"
            self._upload = threading.Thread(target=self._send, args=(staged,), name="checkpoint upload", daemon=True)
            self._upload.start()

    def _send(self, staged: Path) -> None:
        try:
            files = self._store.upload_folder(staged, self._place)
            if self._done:
                return
            manifest = {"name": Path(self._place).name, "files": [asdict(file) for file in files]}
            self._store.put(f"{self._root}/{staged.name}.json", json.dumps(manifest).encode())
            for old in list_manifests(self._store, self._root)[self._keep :]:
                if step_of(old) != step_of(staged.name):  # newer ones are those that could not be fetched a while ago
                    delete(self._store, self._root, old)
        except (StoreError, OSError) as error:
            if not self._done:
                logger.warning("%s was not stored: %s", staged.name, error)

    def _fetch(self) -> None:
        """Bring the newest checkpoint of the store here, unless this machine has a whole one as new."""
        try:
            for manifest in list_manifests(self._store, self._root):
                if step_of(manifest) <= find_newest(self._folder)[0] or self._fetch_one(manifest):
                    return
        except (StoreError, OSError) as error:
            logger.warning("checkpoints of %s are not looked for: %s", self._store.url(self._root), error)

    def _fetch_one(self, manifest: str) -> bool:
        """Bring a checkpoint here; say whether it came. One that never will is deleted, or it would count among those kept."""
        try:
            fetch(self._store, self._root, manifest, self._folder)
        except (StoreError, OSError) as error:
            logger.warning("%s cannot be fetched, looking for an older one: %s", manifest, error)
            if isinstance(error, FileChanged | FileNotFoundError):
                delete(self._store, self._root, manifest)
            return False
        self._uploaded = step_of(manifest)
        logger.info("going on from %s of the store", Path(manifest).stem)
        return True


def discard_checkpoints(store: Store, planned: Planned) -> None:
    """Delete the stored checkpoints of a step that is recorded; what cannot be deleted stays, and costs the step nothing."""
    if planned.step.name not in KEPT_OF:
        return
    root = name_root(planned)
    try:
        for manifest in list_manifests(store, root):
            store.delete(manifest)
        for item in list(store.scan(root)):
            store.delete(item.name)
    except StoreError as error:
        logger.warning("checkpoints stay at %s: %s", store.url(root), error)


def name_root(planned: Planned) -> str:
    """Return where the store has the checkpoints of a step."""
    return f"{ROOT}/{planned.step.name}/{planned.fingerprint}"


def list_manifests(store: Store, root: str) -> list[str]:
    """Return the names of the manifests, that of the newest checkpoint first."""
    names = [item.name for item in store.scan(root)]
    return sorted((name for name in names if name.count("/") == root.count("/") + 1), key=step_of, reverse=True)


def step_of(manifest: str) -> int:
    """Return the step of a checkpoint by the name of its folder or manifest."""
    return int(Path(manifest).stem.removeprefix("step-"))


def delete(store: Store, root: str, manifest: str) -> None:
    """Delete a checkpoint: first what makes it one."""
    found = store.get(manifest)
    store.delete(manifest)
    if found is not None:
        for item in list(store.scan(f"{root}/{json.loads(found[0])['name']}")):
            store.delete(item.name)


def cut_metrics(folder: Path) -> None:
    """Cut the metrics of a work folder to those that its newest checkpoint knows of, as the job does when it goes on: who listens would
    hear the steps behind it twice."""
    _, newest = find_newest(folder)
    known = json.loads((newest / "state.json").read_text())["progress"]["metrics_bytes"] if newest else 0
    metrics = folder / "output" / METRICS_FILE
    if metrics.exists() and metrics.stat().st_size > known:
        os.truncate(metrics, known)


def find_newest(folder: Path) -> tuple[int, Path | None]:
    """Return (step, folder) of the newest whole checkpoint of a work folder; (-1, None) where there is none."""
    newest = max(filter(is_whole, find_named(folder)), key=lambda path: step_of(path.name), default=None)
    return (-1, None) if newest is None else (step_of(newest.name), newest)


def find_named(folder: Path) -> list[Path]:
    """Return what has the name of a complete checkpoint in a work folder."""
    return [path for path in (folder / "work" / "checkpoints").glob("step-*") if path.suffix != ".partial"]


def is_whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint has all its files, those of tensors in the sizes that it says itself."""
    try:
        expected = json.loads((checkpoint / "state.json").read_text())["shards"]
        sizes = {path.name: path.stat().st_size for path in (checkpoint / "tensors").glob("*")}
    except (FileNotFoundError, ValueError, KeyError):
        return False
    return bool(sizes == expected) and (checkpoint / "rng.safetensors").is_file()


def stage(checkpoint: Path, folder: Path) -> Path | None:
    """Return a second name for the files of a checkpoint, which training deletes when it has the next one.

    With them goes what the output tells of its steps. None where it was deleted meanwhile.
    """
    staged = folder / "upload" / checkpoint.name
    shutil.rmtree(staged.parent, ignore_errors=True)
    try:
        for path in files_below(checkpoint):
            target = staged / "checkpoint" / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    except FileNotFoundError:
        return None
    if not is_whole(staged / "checkpoint"):
        return None
    (staged / "output").mkdir()
    for name in BESIDE:
        if (folder / "output" / name).is_file():
            shutil.copyfile(folder / "output" / name, staged / "output" / name)
    return staged


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it."""
    return (path for path in folder.rglob("*") if path.is_file())


def fetch(store: Store, root: str, manifest: str, folder: Path) -> None:
    """Fetch a checkpoint into a work folder, and first what goes beside it; the checkpoint appears whole or not at all."""
    found = store.get(manifest)
    if found is None:
        raise FileNotFoundError(f"{store.url(manifest)}: deleted meanwhile")
    described = json.loads(found[0])
    landing = folder / "download"
    shutil.rmtree(landing, ignore_errors=True)
    landing.mkdir(parents=True)
    files = [StoredFile(**file) for file in described["files"]]
    store.download_folder(f"{root}/{described['name']}", files, landing / "stored")
    (folder / "output").mkdir(exist_ok=True)
    for path in (landing / "stored" / "output").glob("*"):
        path.replace(folder / "output" / path.name)
    checkpoints = folder / "work" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for damaged in find_named(folder):  # training takes the newest by name
        if not is_whole(damaged):
            logger.warning("%s is damaged: deleted for %s of the store", damaged, Path(manifest).stem)
            shutil.rmtree(damaged)
    (landing / "stored" / "checkpoint").rename(checkpoints / Path(manifest).stem)
    shutil.rmtree(landing)
