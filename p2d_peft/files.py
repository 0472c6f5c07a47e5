"""Reading and writing small JSON files, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, data: Any) -> None:
    """
    Write `data` as JSON to `path`, so that at any moment the file holds either its old content or all of the new.

    Args:
        path (`str` or `Path`): The file to write; missing parent folders are made.
        data (`Any`): Plain JSON types. NaN and infinities, which JSON lacks, are refused.

    Raises:
        `ValueError`: if `data` holds NaN or an infinity.
    """
    path = Path(path)
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """
    Read a JSON file.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a JSON file: {error}") from error
