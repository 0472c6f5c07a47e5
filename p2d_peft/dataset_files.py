"""Datasets by name: what `load_dataset` and `load_from_disk` read, and `save_to_disk`, Parquet, JSON lines and CSV write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow.csv import CSVWriter

from .files import check_new, unfinished


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_WITH_SPLIT = re.compile(r"(.+):([^:\[\]]+(?:\[.*\])?)")  # and, of the split, perhaps a slice


def is_whole(source: str) -> bool:
    """Whether [`read_dataset`] takes `source` as a whole: a file, or a folder of one `Dataset`, neither of which has splits."""
    return _is_file(source) or _is_saved_dataset(source)


def is_local(source: str) -> bool:
    """Whether [`read_dataset`] looks for `source` here rather than on the Hub."""
    return _is_file(source) or Path(source).exists()


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _is_file(source: str) -> bool:
    return _suffix(source) in _READERS


def _is_saved_dataset(folder: str) -> bool:
    return Path(folder, "state.json").is_file() and not _is_saved_dict(folder)


def _is_saved_dict(folder: str) -> bool:
    return Path(folder, "dataset_dict.json").is_file()


def read_dataset(
    source: str, config: str | None = None, split: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Read a dataset.

    Args:
        source (`str`): A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder that `save_to_disk` wrote, or what
            `load_dataset` takes, with `:split` behind it where that is not `train`.
        config (`str`, *optional*): The configuration's name, for `load_dataset`.
        split (`str`, *optional*): The split, in place of `:split`. All of a file, and of a folder of one `Dataset`, is its
            split `train`; of a file, this can be a slice, such as `train[:10%]`.
        streaming (`bool`, *optional*, defaults to `False`): Whether to give a stream.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if a file is empty, damaged or of another kind, a folder holds several splits and none is named, or
            there is no such split or configuration.
    """
    try:
        return _read(source, config, split, streaming)
    except (DatasetGenerationError, pa.ArrowException) as error:
        # of the first of these the cause says what is wrong
        raise ValueError(f"'{source}' cannot be read: {error.__cause__ or error}") from error


def _read(source: str, config: str | None, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    if split is None and not is_local(source) and (named := _WITH_SPLIT.fullmatch(source)):
        source, split = named.groups()
    if Path(source).is_file() and not _is_file(source):
        raise ValueError(f"'{source}' is not read: a file is one of {', '.join(_READERS)}, by its ending.")
    if not is_whole(source) and not _is_saved_dict(source):
        return load_dataset(source, config, split=split or "train", streaming=streaming)
    if config is not None:
        raise ValueError(f"'{source}' has no configurations, got '{config}'; leave it out.")
    if _is_file(source):
        return _read_file(source, split or "train", streaming)
    saved = _read_saved(source, split)
    return saved.to_iterable_dataset() if streaming else saved


def _read_file(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{source}'.")
    if not path.stat().st_size:
        raise ValueError(f"'{source}' is empty.")
    if not split.startswith("train["):  # a slice, which `load_dataset` knows
        _check_is_all(source, split)
    try:
        return load_dataset(_READERS[_suffix(source)], data_files=str(path), split=split, streaming=streaming)
    except ValueError as error:  # what old versions of datasets say of bad JSON lines names no file
        raise ValueError(f"'{source}' cannot be read: {error}") from error


def _read_saved(source: str, split: str | None) -> Dataset:
    saved = load_from_disk(source)
    if isinstance(saved, Dataset):
        _check_is_all(source, split or "train")
        return saved
    if split not in saved:
        raise ValueError(f"'{source}' has the splits {', '.join(saved)}; name one: '{source}:{next(iter(saved))}'.")
    return saved[split]


def _check_is_all(source: str, split: str) -> None:
    """Check the split that is asked for of a source that [`is_whole`]: another would stand for other rows."""
    if split != "train":
        raise ValueError(
            f"'{source}' has no split '{split}': all of it is 'train'. Name that, or leave the split out."
        )


def check_new_dataset(target: str | Path, features: Features | None = None) -> None:
    """
    Check, before any work, that a dataset can be written to `target`.

    Args:
        target (`str` or `Path`): What [`write_dataset`] is to be given.
        features (`Features`, *optional*): The dataset's columns, where they are known.

    Raises:
        `ValueError`: if `target` exists, or has the ending of a file that can be read but not written, or that cannot hold
            such columns.
        `OSError`: if nothing can be written there.
    """
    suffix = _suffix(target)
    if not Path(target).name:
        raise ValueError(f"'{target}' is no name for a file or a folder.")
    if suffix in _READERS and suffix not in _WRITERS:
        raise ValueError(f"'{target}': rows are not written as {suffix}; take {', '.join(_WRITERS)}, or a folder.")
    for name, feature in (features or {}).items():
        if unfit := _unfit(suffix, feature):
            kind = suffix[1:].upper()
            raise ValueError(f"'{target}': {kind} cannot hold the column '{name}', which {unfit}.")
    check_new(target)


def _unfit(suffix: str, feature: Any) -> str | None:
    """Why a column cannot be written to a file with an ending, and where it can; None if it can."""
    kind = Features({"column": feature}).arrow_schema.field("column").type
    # images and sounds, too
    if suffix in (".csv", ".jsonl") and holds_type(kind, _is_bytes):
        return "holds bytes; take .parquet or a folder"
    if suffix == ".csv" and not isinstance(feature, Value | ClassLabel):
        return "is nested; take .jsonl or .parquet"
    if suffix == ".csv" and pa.types.is_string_view(kind):
        return f"is of type {kind}; take .jsonl or .parquet"
    return None


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def holds_type(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type of Arrow, or one anywhere within it, is one that is wanted."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return wanted(kind) or any(holds_type(kind.field(index).type, wanted) for index in range(kind.num_fields))


def _write_json(dataset: Dataset, path: str) -> None:
    # as text that says what it is, and to the last decimal that is offered: the default is 10, and dates as numbers
    dataset.to_json(path, double_precision=15, date_format="iso", date_unit="us")


def _write_csv(dataset: Dataset, path: str) -> None:
    # not `to_csv`, which makes 1.0 of 1 where the column has an empty place
    with CSVWriter(path, dataset.features.arrow_schema) as writer:
        for table in dataset.with_format("arrow").iter(1000):
            writer.write_table(table)


_WRITERS: dict[str, Callable[[Dataset, str], object]] = {
    ".jsonl": _write_json,
    ".parquet": Dataset.to_parquet,
    ".csv": _write_csv,
}


def write_dataset(dataset: Dataset, target: str | Path) -> None:
    """
    Write a dataset, in full or not at all: to a `.jsonl`, `.parquet` or `.csv` file by its ending, otherwise as a folder
    for `load_from_disk`.

    Raises:
        `ValueError`, `OSError`: as [`check_new_dataset`] does.
    """
    check_new_dataset(target, dataset.features)
    with unfinished(target) as path:
        _WRITERS.get(_suffix(target), Dataset.save_to_disk)(dataset, str(path))
