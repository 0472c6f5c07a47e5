"""Writing files and folders whole or not at all, and reading small JSON files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError


_HOW_TO_GO_ON = "What was there before is as it was; make room, or give a place that can be written to."


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Context that hands out a temporary name beside `path`. On leaving, the file written there takes the place of `path`,
    so that at any moment `path` holds either its old content or all of the new; after an exception it stays as it was.

    Args:
        path (`str` or `Path`): The file to write; missing parent folders are made.

    Raises:
        `OSError`: if it cannot be written, because the disk is full, say; the message names `path`.
    """
    path = Path(path)
    # "_": what begins so is not uploaded by a Trainer that pushes the folder in the background
    # no process number: containers that share a folder have the same ones
    temporary = path.with_name(f"_{path.name}.{uuid4().hex}.tmp")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # it was not made, or cannot be removed: what went wrong before is to be told
                temporary.unlink()


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """
    Context in which an error of the system that ends the writing of `target` names it, rather than a temporary file, and
    says how to go on. It keeps its `errno`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None:  # not of the system but of a library
            raise OSError(f"'{target}' could not be written: {error}. {_HOW_TO_GO_ON}") from error
        if isinstance(error, FileExistsError):  # a file in the place of a folder: folders that are there are no error
            number = errno.ENOTDIR
        raise OSError(number, f"'{target}' could not be written: {os.strerror(number)}. {_HOW_TO_GO_ON}") from error


def check_new(target: str | Path) -> None:
    """
    Check, before any work, that something new can be written to `target`.

    Raises:
        `ValueError`: if something is there already: it may have taken hours to make.
        `OSError`: as [`check_writable`] does.
    """
    if Path(target).exists():
        raise ValueError(f"'{target}' exists already; give another name, or move it away.")
    check_writable(target)


def check_writable(target: str | Path) -> None:
    """
    Check, before any work, that a file can be made or replaced: that something can be made in the folder that it goes to, or
    in the nearest one that is there. What the permissions say is not enough, as they do not bind root, and a file system may
    be read-only.

    Raises:
        `OSError`: if it cannot; the message names `target`.
    """
    target = Path(target)
    # os.path: what lies beneath a file, or has too long a name, is not there
    folder = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    with _naming(target), tempfile.TemporaryFile(dir=folder):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")


@contextmanager
def unfinished(target: str | Path) -> Iterator[Path]:
    """
    Context that gives the path to write a file or folder to which becomes `target` when the block has ended, and
    vanishes if it ends in an exception.

    Args:
        target (`str` or `Path`): What is to be written; missing parent folders are made.

    Raises:
        `ValueError`: if `target` exists.
        `OSError`: if it cannot be written, because the disk is full, say; the message names `target`.
    """
    check_new(target)
    target = Path(target)
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # within a folder of its own: a folder that `mkdtemp` makes can be read by its owner only
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield folder / target.name
            os.replace(folder / target.name, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
        raise ValueError(f"'{path}' is not a JSON file: {error}; it may be cut off. Write it anew.") from error
