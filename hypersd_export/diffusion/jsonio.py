"""Strict values, from JSON and from Python: unknown or missing keys, wrong types and names are one-line errors."""

from collections.abc import Mapping
from enum import StrEnum
from math import isfinite
from typing import Any, TypeGuard, TypeVar

from hypersd_export.errors import PlanError

Enum = TypeVar("Enum", bound=StrEnum)


def checked_object(data: object, *, what: str, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    """`data` as a mapping with all of `required` and nothing beyond `optional`; `PlanError` otherwise."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{what}: expected a JSON object, found {type(data).__name__}")
    missing = sorted(required - data.keys())
    unknown = sorted(str(key) for key in data.keys() - required - optional)
    if missing:
        raise PlanError(f"{what}: missing {', '.join(missing)}")
    if unknown:
        raise PlanError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(sorted(required | optional))}")
    return data


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite int or float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def checked_int(value: object, *, what: str) -> int:
    """`value` as an int; an integral float passes, since other JSON writers may produce one."""
    if is_number(value) and float(value).is_integer():
        return int(value)
    raise PlanError(f"{what} {value!r}: must be a whole number")


def checked_number(value: object, *, what: str) -> float:
    """`value` as a finite float."""
    if not is_number(value):
        raise PlanError(f"{what} {value!r}: must be a finite number")
    return float(value)


def checked_bool(value: object, *, what: str) -> bool:
    """`value` as a bool; nothing but true and false passes."""
    if not isinstance(value, bool):
        raise PlanError(f"{what} {value!r}: must be true or false")
    return value


def checked_list(value: object, *, what: str) -> list[Any]:
    """`value` as a list; a tuple passes."""
    if not isinstance(value, list | tuple):
        raise PlanError(f"{what}: expected a JSON array, found {type(value).__name__}")
    return list(value)


def checked_enum(kind: type[Enum], value: object, *, what: str) -> Enum:
    """`value` as a member of `kind`: a member, or its name as users write it."""
    try:
        return kind(str(value))
    except ValueError:
        raise PlanError(f"{what} {str(value)!r}: must be one of {', '.join(kind)}") from None


def coerce_enum(owner: object, name: str, kind: type[Enum], what: str) -> None:
    """Replace the field of a frozen dataclass by the member of `kind` that it names.

    A plain string would compare unequal to every member and choose a wrong branch without a word.
    """
    object.__setattr__(owner, name, checked_enum(kind, getattr(owner, name), what=what))
