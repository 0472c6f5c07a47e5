"""Writing files whole or not at all, and reading small JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Context that hands out a temporary name beside `path`. On leaving, the file written there takes the place of `path`,
    so that at any moment `path` holds either its old content or all of the new; after an exception it stays as it was.

    Args:
        path (`str` or `Path`): The file to write; missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # "_": what begins so is not uploaded by a Trainer that pushes the folder in the background
    temporary = path.with_name(f"_{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """
    Write `data` as JSON to `path`, whole or not at all. A file that holds just that is left alone.

    Args:
        path (`str` or `Path`): The file to write; missing parent folders are made.
        data (`Any`): Plain JSON types. NaN and infinities, which JSON lacks, are refused.

    Raises:
        `ValueError`: if `data` holds NaN or an infinity.
    """
    text = json_text(data)
    if Path(path).is_file() and Path(path).read_bytes() == text.encode():
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(data: Any) -> str:
    """What [`write_json`] writes into a file."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """
    Read a JSON file.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of bad JSON, bad UTF-8, overlong numbers, and deep nesting
        raise ValueError(f"'{path}' is not a JSON file: {error}") from error
