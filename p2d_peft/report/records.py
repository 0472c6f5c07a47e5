"""
Records: dataclasses that are JSON files.

A run's folder may come from anyone, so what is read is held against the types that its dataclass declares before anything
is done with it.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from ..files import read_json, write_json


R = TypeVar("R", bound="Record")


class Record:
    """
    Base of dataclasses that are kept as a JSON file. The file says what it is (`format`) and in which version (`schema`).

    Attributes:
        format (`str`): What the file calls itself.
        title (`str`): What messages call it.
        schema (`int`): The version that is written.
        since (`dict[int, dict[str, Any]]`): For each later version, the fields that it added, with the values that stand
            for "not recorded" in a file of an earlier one. Versions from 1 on are read.
    """

    format: ClassVar[str]
    title: ClassVar[str]
    schema: ClassVar[int] = 1
    since: ClassVar[dict[int, dict[str, Any]]] = {}

    def save(self, path: str | Path) -> None:
        """Write the record as JSON to the file `path`."""
        write_json(path, {"format": self.format, "schema": self.schema, **dataclasses.asdict(self)})  # type: ignore[call-overload]

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """
        Read what `save` wrote, also in an earlier version.

        Raises:
            `ValueError`: if the file is no such record, is of a version that is not known, or a value in it is missing or
                of another type than documented; the message names it.
        """
        data: Any = read_json(path)
        if not cls.is_format_of(data):
            raise ValueError(f"'{path}' is not {cls.title}.")
        schema = data.get("schema")
        if isinstance(schema, bool) or schema not in range(1, cls.schema + 1):
            raise ValueError(
                f"'{path}' is {cls.title} of schema {reprlib.repr(schema)}, but this version of p2d_peft reads 1 to "
                f"{cls.schema}; use the version that wrote it, or a newer one."
            )
        for version, added in cls.since.items():
            if schema < version:
                data = {**added, **data}
        try:
            return _read(cls, data, "")
        except _WrongError as error:
            raise ValueError(
                f"'{path}' is damaged: {str(error).rstrip('.')}. Make it again with the run, or get another copy."
            ) from error

    @classmethod
    def is_format_of(cls, data: Any) -> bool:
        """Whether the contents of a JSON file are such a record, of whatever version."""
        return isinstance(data, Mapping) and data.get("format") == cls.format


class _WrongError(Exception):
    pass


def _read(declared: Any, value: Any, name: str) -> Any:
    """A JSON value as what a field declares; `name` is where it stands."""
    kind, inner = get_origin(declared), get_args(declared)
    if kind in (Union, UnionType):
        options = [option for option in inner if option is not NoneType]
        if value is None and len(options) < len(inner):
            return None
        if len(options) == 1:  # whose own message tells more
            return _read(options[0], value, name)
        for option in options:
            with suppress(_WrongError):
                return _read(option, value, name)
    elif kind is list and isinstance(value, list):
        return [_read(inner[0], entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    elif kind is dict and isinstance(value, dict):
        return {key: _read(inner[1], entry, f"{name}[{reprlib.repr(key)}]") for key, entry in value.items()}
    elif dataclasses.is_dataclass(declared) and isinstance(value, dict):
        return _read_dataclass(declared, value, name)
    elif declared is float and _is((int, float), value):
        with suppress(OverflowError):  # an int may be longer than any float
            if math.isfinite(value):
                return float(value)
    elif kind is None and _is(declared, value):
        return value
    wanted = str(declared) if kind else declared.__name__
    raise _WrongError(f"`{name}` must be {wanted}, got {reprlib.repr(value)}")


def _read_dataclass(cls: Any, data: dict[str, Any], name: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        where = f"{name}.{field.name}" if name else field.name
        if field.name not in data:
            raise _WrongError(f"`{where}` is missing")
        values[field.name] = _read(hints[field.name], data[field.name], where)
    try:
        return cls(**values)
    except ValueError as error:
        raise _WrongError(f"in `{name}`, {error}" if name else str(error)) from error


def _is(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
