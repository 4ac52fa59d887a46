"""`--set a.b=c`: a config with some fields changed, checked as a whole."""

import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from training.config import Config

AnyConfig = TypeVar("AnyConfig", bound=Config)


def override(config: AnyConfig, changes: Sequence[str]) -> AnyConfig:
    """Return the config with each `a.b=value` applied; a value is JSON where it reads as JSON, else text.

    Raises ValueError naming the unknown key with the nearest known ones, or every field that refuses its value.
    """
    values = config.model_dump(mode="json")
    for change in changes:
        path, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set {change!r}: got no '=', expected a.b=value")
        _assign(values, path.split("."), _parse(text), change=change)
    try:
        return type(config).model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = "\n  ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}; got {fault['input']!r}"
            for fault in error.errors(include_url=False)
        )
        raise ValueError(
            f"{type(config).__name__}: {error.error_count()} fields refuse their values:\n  {faults}"
        ) from None


def _assign(values: Any, path: Sequence[str], value: Any, *, change: str) -> None:
    """Set the value at a path of keys, or of indices into a list."""
    *parents, last = path
    here = values
    for key in parents:
        here = here[_key(here, key, change=change)]
    here[_key(here, last, change=change)] = value


def _key(here: Any, key: str, *, change: str) -> Any:
    if isinstance(here, list) and key.isdigit() and int(key) < len(here):
        return int(key)
    if isinstance(here, dict) and key in here:
        return key
    known = (
        list(here) if isinstance(here, dict) else [str(i) for i in range(len(here))] if isinstance(here, list) else []
    )
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known
    raise ValueError(f"--set {change!r}: unknown key {key!r}; expected {' or '.join(near) or 'no further key'}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
