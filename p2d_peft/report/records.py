"""
Records: dataclasses that are JSON files.

A run's folder may come from anyone, so what is read is held against the types that its dataclass declares before anything
is done with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..files import read_json, write_json
from ..json_fields import checked_fields
from ..printable import shown


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
                f"'{path}' is {cls.title} of schema {shown(schema)}, but this version of p2d_peft reads 1 to "
                f"{cls.schema}; use the version that wrote it, or a newer one."
            )
        for version, added in cls.since.items():
            if schema < version:
                data = {**added, **data}
        try:
            return cls(**checked_fields(cls, data))
        except ValueError as error:
            raise ValueError(
                f"'{path}' is damaged: {str(error).rstrip('.')}. Make it again with the run, or get another copy."
            ) from error

    @classmethod
    def is_format_of(cls, data: Any) -> bool:
        """Whether the contents of a JSON file are such a record, of whatever version."""
        return isinstance(data, Mapping) and data.get("format") == cls.format
