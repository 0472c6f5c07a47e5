"""Reading dataclasses from JSON that anyone may have written or damaged."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .printable import shown


def checked_fields(kind: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """
    The entries of a JSON object that are fields of a dataclass, each of the type that the dataclass says. Other entries
    are left out: a later version may have written them.

    A `float` takes any finite number, a `tuple` a list. What is no type of JSON has to be an instance, made before.

    Args:
        kind (`type`): The dataclass.
        data (`Mapping[str, Any]`): The object.

    Raises:
        `ValueError`: if an entry is of another type, or one is missing whose field has no default; the message names it.
    """
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in data:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"'{field.name}' is missing.")
            continue
        value = data[field.name]
        if not _fits(value, hints[field.name]):
            raise ValueError(f"'{field.name}' must be {_name(hints[field.name])}, got {shown(value)}.")
        found[field.name] = value
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (list, tuple):  # tuple[int, ...]: parts[1] is the ellipsis
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind in (int, float):  # a bool is an int to Python, and an int no float
        wanted = int if kind is int else (int, float)
        return isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _name(hint: Any) -> str:
    """A type as it is written, without its module."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
