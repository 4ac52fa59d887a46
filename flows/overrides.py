"""`--set a.b=c`: a config with some fields changed, checked as a whole."""

import difflib
import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from training.config import Config

AnyConfig = TypeVar("AnyConfig", bound=Config)


def override(config: AnyConfig, changes: Sequence[str]) -> AnyConfig:
    """Return the config with each `a.b=value` applied in turn; a value is JSON where it reads as JSON, else text.

    The tag of a choice (`train.objective=dpo`) takes the other member: fields that both have keep their values, its others
    have their defaults, and later changes reach them.
    Raises ValueError naming the unknown key with the nearest known ones, or every field that refuses its value.
    """
    values = config.model_dump(mode="json")
    for change in changes:
        path, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set {change!r}: got no '=', expected a.b=value")
        _assign(values, path.split("."), _parse(text), change=change)
        _follow_tag(type(config), values, path.split("."))
    return make(type(config), values)


def make(kind: type[AnyConfig], values: Any) -> AnyConfig:
    """Return a config of JSON values. Raises ValueError naming every field that refuses its value."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = "\n  ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}; got {fault['input']!r}"
            for fault in error.errors(include_url=False)
        )
        raise ValueError(f"{kind.__name__}: {error.error_count()} fields refuse their values:\n  {faults}") from None


def _assign(values: Any, path: Sequence[str], value: Any, *, change: str) -> None:
    """Set the value at a path of keys, or of indices into a list."""
    *parents, last = path
    here = values
    for key in parents:
        here = here[_key(here, key, change=change)]
    here[_key(here, last, change=change)] = value


def _follow_tag(kind: type[Config] | None, values: Any, path: Sequence[str]) -> None:
    """Give the values around a tag that was just set the fields of the member it names."""
    field: FieldInfo | None = None
    for name in path[:-1]:
        if kind is None or name not in kind.model_fields:
            return
        field, values = kind.model_fields[name], values[name]
        kind = _members(field).get(values.get(field.discriminator) if field.discriminator else None)
    if field is None or field.discriminator != path[-1] or kind is None:
        return
    required: dict[str, Any] = {name: None for name, field in kind.model_fields.items() if field.is_required()}
    kept = {name: value for name, value in values.items() if name in kind.model_fields}
    values.clear()
    values.update(required | kind.model_construct().model_dump(mode="json") | kept)


def _members(field: FieldInfo) -> dict[str | None, type[Config]]:
    """Return the configs that a field may hold by tag; by None where it is no choice."""
    options = get_args(field.annotation) or (field.annotation,)
    configs = [option for option in options if isinstance(option, type) and issubclass(option, Config)]
    if not isinstance(field.discriminator, str):
        return dict.fromkeys([None], configs[0]) if configs else {}
    return {config.model_fields[field.discriminator].default: config for config in configs}


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
