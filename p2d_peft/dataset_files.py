"""Datasets by name: what `load_dataset` and `load_from_disk` read, and `save_to_disk`, Parquet, JSON lines and CSV write."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException

from .files import check_new, unfinished


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_WRITERS = {".jsonl": "to_json", ".parquet": "to_parquet", ".csv": "to_csv"}


def is_dataset_file(source: str) -> bool:
    """Whether [`read_dataset`] takes `source` for a file, which has no splits."""
    return Path(source).suffix in _READERS


def read_dataset(
    source: str, config: str | None = None, split: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Read a dataset.

    Args:
        source (`str`): A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder that `save_to_disk` wrote, or what
            `load_dataset` takes, with `:split` behind it where that is not `train`.
        config (`str`, *optional*): The configuration's name, for `load_dataset`.
        split (`str`, *optional*): The split, in place of `:split`; a file is taken whole.
        streaming (`bool`, *optional*, defaults to `False`): Whether to give a stream.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if a file is empty or damaged, or a folder holds several splits and none is named.
    """
    try:
        return _read(source, config, split, streaming)
    except (DatasetGenerationError, ArrowException) as error:
        # of the first of these the cause says what is wrong
        raise ValueError(f"'{source}' cannot be read: {error.__cause__ or error}") from error


def _read(source: str, config: str | None, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    path = Path(source)
    if is_dataset_file(source):
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{source}'.")
        if not path.stat().st_size:
            raise ValueError(f"'{source}' is empty.")
        try:
            return load_dataset(_READERS[path.suffix], data_files=str(path), split="train", streaming=streaming)
        except ValueError as error:  # what old versions of datasets say of bad JSON lines names no file
            raise ValueError(f"'{source}' cannot be read: {error}") from error
    name = source
    if split is None and ":" in source:
        name, _, split = source.rpartition(":")
    if Path(name).is_dir() and (Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists()):
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(
                    f"'{name}' has the splits {', '.join(loaded)}; name one: '{name}:{next(iter(loaded))}'."
                )
            loaded = loaded[split]
        return loaded.to_iterable_dataset() if streaming else loaded
    return load_dataset(name, config, split=split or "train", streaming=streaming)


def check_new_dataset(target: str | Path) -> None:
    """
    Check, before any work, that a dataset can be written to `target`.

    Raises:
        `ValueError`: if `target` exists, or has the ending of a file that can be read but not written.
        `OSError`: if nothing can be written there.
    """
    suffix = Path(target).suffix
    if not Path(target).name:
        raise ValueError(f"'{target}' is no name for a file or a folder.")
    if suffix in _READERS and suffix not in _WRITERS:
        raise ValueError(f"'{target}': rows are not written as {suffix}; take {', '.join(_WRITERS)}, or a folder.")
    check_new(target)


def write_dataset(dataset: Dataset, target: str | Path) -> None:
    """
    Write a dataset, in full or not at all: to a `.jsonl`, `.parquet` or `.csv` file by its ending, otherwise as a folder
    for `load_from_disk`.

    Raises:
        `ValueError`, `OSError`: as [`check_new_dataset`] does.
    """
    check_new_dataset(target)
    with unfinished(target) as path:
        getattr(dataset, _WRITERS.get(Path(target).suffix, "save_to_disk"))(str(path))
