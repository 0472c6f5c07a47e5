"""Reading dataclasses from JSON that anyone may have written or damaged."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .printable import shown


def checked_fields(kind: type, data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """
    The entries of a JSON object that are fields of a dataclass, each of the type that the dataclass says. Other entries
    are left out: a later version may have written them.

    A `float` takes any finite number, a `tuple` a list, a dataclass an object. What is no type of JSON has to be an
    instance, made before.

    Args:
        kind (`type`): The dataclass.
        data (`Mapping[str, Any]`): The object.
        where (`str`, *optional*): What to put before the fields' names in messages.

    Raises:
        `ValueError`: if an entry is of another type, or one is missing whose field has no default; the message names it.
    """
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = where + field.name
        if field.name in data:
            found[field.name] = _read(hints[field.name], data[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"'{name}' is missing.")
    return found


def _read(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as what a field declares; `name` is where it stands."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return value
    if kind in (Union, types.UnionType):
        options = [part for part in parts if part is not types.NoneType]
        if value is None and len(options) < len(parts):
            return None
        # of a value that may be none, or one thing, that thing's own message tells more
        if len(options) == 1 and (get_origin(options[0]) or dataclasses.is_dataclass(options[0])):
            return _read(options[0], value, name)
        for option in options:
            with suppress(ValueError):
                return _read(option, value, name)
    elif kind is Literal:
        if isinstance(value, str) and value in parts:
            return value
    elif kind in (list, tuple):  # tuple[int, ...]: parts[1] is the ellipsis
        if isinstance(value, list):
            return [_read(parts[0], entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    elif kind is dict:
        if isinstance(value, dict):
            return {key: _read(parts[1], entry, f"{name}[{shown(key)}]") for key, entry in value.items()}
    elif kind in (int, float):  # a bool is an int to Python, and an int no float
        wanted = int if kind is int else (int, float)
        with suppress(OverflowError):  # an int may be longer than any float
            if isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value):
                return kind(value)
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        assert isinstance(kind, type)
        try:
            return kind(**checked_fields(kind, value, f"{name}."))
        except TypeError as error:
            raise ValueError(f"'{name}': {error}") from error
    elif isinstance(value, kind):
        return value
    raise ValueError(f"'{name}' must be {_name(hint)}, got {shown(value)}.")


def _name(hint: Any) -> str:
    """A type as it is written, without its module."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
