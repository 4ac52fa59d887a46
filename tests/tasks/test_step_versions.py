"""A step whose code changed has another version, or somebody said that the change is neutral."""

import json

from tests.golden.step_sources import ENTRIES, FILE, describe, read_steps


def test_every_step_is_watched() -> None:
    assert set(read_steps()) == set(ENTRIES)


def test_a_changed_step_has_a_new_version_or_a_word_of_neutrality() -> None:
    recorded, now = json.loads(FILE.read_text()), describe()
    silent = [name for name in now if now[name] != recorded.get(name)]
    assert not silent, (
        f"the sources or versions of {', '.join(silent)} changed. If the same config now means another result, raise the "
        "step's version in tasks/; then, or if nothing that comes out changes, run `python -m tests.golden.step_sources`"
    )
