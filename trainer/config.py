"""Configurations as frozen dataclasses: `--set a.b=value` on the command line, JSON on disk."""

import dataclasses
import enum
import json
import math
import types
import typing
from typing import Any, TypeVar

from hypersd_export.errors import HypersdError, OptionError

C = TypeVar("C")


def override(config: C, assignments: list[str]) -> C:
    """A copy of a (nested, frozen) dataclass with each "a.b=value" applied; values are JSON, or plain text.

    An entry of a list of groups is named by its number ("stages.0.steps=100"), or the whole list is given as JSON
    objects; an enum is given by its value; a list of numbers as JSON ("guidance=[3,5]"). All assignments are applied
    together, so that two that are only valid as a pair may come in any order; of two to the same key the later holds.

    Raises OptionError on an unknown key (naming those there are) and on a value of another type.
    """
    pairs = []
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        if not found:
            raise OptionError(f"--set {assignment!r} has no '='; write --set key=value")
        pairs.append((key.split("."), text, key))
    return _group(config, pairs) if pairs else config


def as_json(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON data."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Plain JSON data as {"a.b": value}; entries of lists of objects by number, every other list a value."""
    if isinstance(data, dict):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data and all(isinstance(entry, dict) for entry in data):
        items = [(str(number), value) for number, value in enumerate(data)]
    else:
        return {prefix.removesuffix("."): data}
    return {name: value for key, part in items for name, value in flat(part, f"{prefix}{key}.").items()}


_Pairs = list[tuple[list[str], str, str]]
"""(the rest of the path, the value's text, the whole key for the message) of each assignment."""


def _group(config: Any, pairs: _Pairs) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    kinds = typing.get_type_hints(type(config))
    return dataclasses.replace(config, **_parts(pairs, {name: (getattr(config, name), kinds[name]) for name in names}))


def _entries(entries: tuple[Any, ...], pairs: _Pairs) -> tuple[Any, ...]:
    changed = _parts(pairs, {str(number): (entry, type(entry)) for number, entry in enumerate(entries)})
    return tuple(changed.get(str(number), entry) for number, entry in enumerate(entries))


def _parts(pairs: _Pairs, parts: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """New values of those of `parts` ({name: (value, type)}) that `pairs` name."""
    groups: dict[str, _Pairs] = {}
    for path, text, key in pairs:
        if path[0] not in parts:
            raise OptionError(f"--set {key}: unknown key {path[0]!r}; there are: {', '.join(parts)}")
        groups.setdefault(path[0], []).append((path[1:], text, key))
    return {name: _value(*parts[name], name, rest) for name, rest in groups.items()}


def _value(current: Any, kind: Any, name: str, pairs: _Pairs) -> Any:
    whole = [pair for pair in pairs if not pair[0]]
    inner = [pair for pair in pairs if pair[0]]
    entry = _entry_type(kind)
    if whole:
        _, text, key = whole[-1]
        if dataclasses.is_dataclass(current):
            raise OptionError(f"--set {key}: {name!r} is a group; name one value")
        current = _read_entries(entry, text, key) if entry else _parse(kind, text, key)
    if not inner:
        return current
    if entry:
        return _entries(current, inner)
    if not dataclasses.is_dataclass(current):
        raise OptionError(f"--set {inner[0][2]}: {name!r} has no parts; name one value")
    return _group(current, inner)


def _entry_type(kind: Any) -> Any:
    """The dataclass of a `tuple[Dataclass, ...]`, else None."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and arguments and dataclasses.is_dataclass(arguments[0]):
        return arguments[0]
    return None


def _read_entries(entry: Any, text: str, key: str) -> tuple[Any, ...]:
    data = _json(text)
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise OptionError(f"--set {key}={text}: not a list of JSON objects; to change one entry, write {key}.0.name=…")
    kinds, made = typing.get_type_hints(entry), []
    for number, item in enumerate(data):
        unknown = sorted(set(item) - set(kinds))
        if unknown:
            raise OptionError(f"--set {key}: unknown key {unknown[0]!r}; there are: {', '.join(kinds)}")
        values = {
            name: _parse(kinds[name], json.dumps(value), f"{key}.{number}.{name}") for name, value in item.items()
        }
        try:
            made.append(entry(**values))
        except HypersdError:
            raise
        except TypeError as error:  # a field without a default is missing
            raise OptionError(f"--set {key}: entry {number}: {error}") from error
    return tuple(made)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        return text


def _parse(kind: Any, text: str, key: str) -> Any:
    try:
        return _cast(kind, _json(text), text)
    except (ValueError, OverflowError) as error:
        raise OptionError(f"--set {key}={text}: {error}") from error


def _cast(kind: Any, value: Any, text: str) -> Any:
    """`value` as a `kind`, or ValueError saying what it is not; `text` is what a plain string was written as."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        for option in arguments:
            try:
                return _cast(option, value, text)
            except ValueError:
                continue
        raise ValueError(f"not a {kind}")
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        choices = [member.value for member in origin]
        if value not in choices:
            raise ValueError(f"not one of {', '.join(map(str, choices))}")
        return origin(value)
    if origin is tuple:
        return _cast_tuple(arguments, value)
    if origin is str and not isinstance(value, list | dict):
        return value if isinstance(value, str) else text
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong = not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"not a {getattr(kind, '__name__', kind)}")
    return value


def _cast_tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list; write it as JSON, e.g. [1, 2]")
    if not arguments:
        return tuple(value)
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    if not endless and len(value) != len(arguments):
        raise ValueError(f"has {len(value)} entries, must have {len(arguments)}")
    inner = [arguments[0]] * len(value) if endless else arguments
    return tuple(_cast(each, item, str(item)) for each, item in zip(inner, value, strict=True))
