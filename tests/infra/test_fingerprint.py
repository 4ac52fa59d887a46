"""Identity: one text for one value, a refusal for what has none, other bytes never taken for the same."""

import os
from enum import StrEnum
from pathlib import Path

import pytest

from infra.fingerprint import Digests, canonical_json, diff_identities, digest_file, fingerprint


class Colour(StrEnum):
    red = "red"


def test_canonical_json_is_one_text_and_the_fingerprint_its_sha256() -> None:
    value = {"b": [1, 2.5, None], "a": {"z": "ü", "y": True}}
    assert canonical_json(value) == '{"a":{"y":true,"z":"ü"},"b":[1,2.5,null]}'
    assert canonical_json({"a": {"y": True, "z": "ü"}, "b": (1, 2.5, None)}) == canonical_json(value)
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of '{}'


def test_int_and_float_and_bool_are_three_identities() -> None:
    assert len({fingerprint(value) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x"), b"x", {1: 2}, object(), Colour.red])
def test_what_has_no_deterministic_form_raises(value: object) -> None:
    with pytest.raises(TypeError, match=r"value\.inner"):
        canonical_json({"inner": value})


def test_differences_name_their_path() -> None:
    old = {"config": {"lambda_": 1.0, "seed": 0}, "inputs": {"rows": "aa"}}
    new = {"config": {"lambda_": 0.5, "seed": 0}, "inputs": {"rows": "aa", "base": "bb"}}
    assert diff_identities(old, new) == ["config.lambda_: 1.0 -> 0.5", 'inputs.base: null -> "bb"']


def test_folder_digest_knows_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "memory.sqlite")
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_bytes(b"weights")
        (tmp_path / name / ".hidden").write_text(name)
    assert digests.of(tmp_path / "one") == digests.of(tmp_path / "two")
    (tmp_path / "two" / "sub" / "f").rename(tmp_path / "two" / "sub" / "g")
    assert digests.of(tmp_path / "one") != digests.of(tmp_path / "two")


def test_other_weights_at_the_same_path_with_the_same_size_and_time_are_seen(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "memory.sqlite")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"aaaa")
    before, times = digests.of(file), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"bbbb")
    os.utime(file, ns=times)
    assert digests.of(file) != before


def test_a_remembered_digest_counts_until_the_file_changes(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "memory.sqlite")
    file = tmp_path / "fetched"
    file.write_bytes(b"aaaa")
    digests.remember({file: "as it was checked"})
    assert digests.of(file) == "as it was checked"
    file.write_bytes(b"longer")
    assert digests.of(file) == digest_file(file)


def test_nothing_there_and_nothing_inside_are_errors(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "memory.sqlite")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        digests.of(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty folder"):
        digests.of(tmp_path / "empty")
