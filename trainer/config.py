"""Configurations as frozen dataclasses: `--set a.b=value` on the command line, JSON on disk."""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from hypersd_export.errors import OptionError

C = TypeVar("C")


def override(config: C, assignments: list[str]) -> C:
    """A copy of a (nested, frozen) dataclass with each "a.b=value" applied; values are JSON, or plain text.

    Raises OptionError on an unknown key (naming those there are) and on a value of another type.
    """
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        if not found:
            raise OptionError(f"--set {assignment!r} has no '='; write --set key=value")
        config = _set(config, key.split("."), text, key)
    return config


def as_json(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON data."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def _set(config: C, path: list[str], text: str, key: str) -> C:
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    if path[0] not in names:
        raise OptionError(f"--set {key}: unknown key {path[0]!r}; there are: {', '.join(names)}")
    current = getattr(config, path[0])
    if len(path) > 1 or dataclasses.is_dataclass(current):
        if len(path) == 1 or not dataclasses.is_dataclass(current):
            raise OptionError(
                f"--set {key}: {path[0]!r} {'is a group' if len(path) == 1 else 'has no parts'}; name one value"
            )
        value: Any = _set(current, path[1:], text, key)
    else:
        value = _parse(typing.get_type_hints(type(config))[path[0]], text, key)
    return dataclasses.replace(config, **{path[0]: value})  # type: ignore[type-var]


def _parse(kind: Any, text: str, key: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, list):
        value = tuple(value)
    accepted = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise OptionError(f"--set {key}={text}: not a {getattr(kind, '__name__', kind)}")
    return value
