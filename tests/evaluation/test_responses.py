"""What a killed evaluation finds again, and what it does not take up."""

import json
from pathlib import Path

from evaluation.responses import Responses


def test_answers_are_found_again_exactly(tmp_path: Path) -> None:
    first = Responses(tmp_path / "r.jsonl", identity={"seed": 1})
    first.add("loglikelihood", ("a prompt", " b"), (-0.1 - 0.2, True))
    first.add("generate_until", ("a prompt", {"until": ["x"]}), {"text": "tä\n", "cut": False})
    first.close()
    again = Responses(tmp_path / "r.jsonl", identity={"seed": 1})
    assert again.taken_up == 2
    assert again.get("loglikelihood", ("a prompt", " b")) == [-0.1 - 0.2, True]
    assert again.get("generate_until", ("a prompt", {"until": ["x"]})) == {"text": "tä\n", "cut": False}
    assert again.get("generate_until", ("a prompt", {"until": ["y"]})) is None
    again.close()


def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Responses(path, identity=1)
    for number in range(2):
        first.add("k", number, number)
    first.close()
    path.write_bytes(path.read_bytes()[:-3])  # as a kill within a write leaves it
    again = Responses(path, identity=1)
    assert (again.get("k", 0), again.get("k", 1)) == (0, None)
    again.add("k", 1, 5)
    again.close()
    assert Responses(path, identity=1).get("k", 1) == 5


def test_answers_of_another_identity_are_void(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Responses(path, identity={"weights": "a"})
    first.add("k", 0, 0)
    first.close()
    other = Responses(path, identity={"weights": "b"})
    assert (other.taken_up, other.get("k", 0)) == (0, None)
    other.close()
    assert len(path.read_text().splitlines()) == 1


def test_a_file_that_was_torn_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"identity": "x"})[:5])
    assert Responses(path, identity=1).taken_up == 0


def test_what_nobody_asked_for_is_dropped_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Responses(path, identity=1)
    for number in range(3):
        first.add("k", number, number)
    first.close()
    again = Responses(path, identity=1)
    again.get("k", 2)
    again.add("k", 7, 7)
    again.drop_unasked()
    again.close()
    last = Responses(path, identity=1)
    assert [last.get("k", number) for number in (0, 1, 2, 7)] == [None, None, 2, 7]
