"""Checks of options: types and ranges."""

import math
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(config: object) -> None:
    """Raise ValueError where a field of this dataclass is not of the type it was declared with."""
    for name, kind in get_type_hints(type(config)).items():
        if not _is(getattr(config, name), kind):
            name_of_class = kind.__name__ if isinstance(kind, type) else None
            expected = name_of_class or str(kind).replace("typing.", "")
            raise ValueError(f"{name}: expected {expected}, found {getattr(config, name)!r}")


def _is(value: object, kind: object) -> bool:
    """Whether value is of the type that a field was declared with; an int is a float too."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (Union, UnionType):
        return any(_is(value, option) for option in get_args(kind))
    if origin is dict:
        kinds = get_args(kind)
        return isinstance(value, dict) and all(
            _is(part, of) for item in value.items() for part, of in zip(item, kinds, strict=True)
        )
    if origin is list:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def expect(config: object, name: str, test: Callable[[Any], bool], expected: str) -> None:
    """Raise ValueError, with the option's name, unless its value is finite and passes the test."""
    value = getattr(config, name)
    if (isinstance(value, float) and not math.isfinite(value)) or not test(value):
        raise ValueError(f"{name}: expected {expected}, found {value}")
