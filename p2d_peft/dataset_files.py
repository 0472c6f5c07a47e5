"""Datasets by name: what `load_dataset` and `load_from_disk` read, and `save_to_disk`, Parquet, JSON lines and CSV write."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .files import unfinished


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
        `ValueError`: if a folder holds several splits and none is named.
    """
    path = Path(source)
    if is_dataset_file(source):
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{source}'.")
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train", streaming=streaming)
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


def write_dataset(dataset: Dataset, target: str | Path) -> None:
    """
    Write a dataset, in full or not at all: to a `.jsonl`, `.parquet` or `.csv` file by its ending, otherwise as a folder
    for `load_from_disk`.

    Raises:
        `ValueError`: if `target` exists.
    """
    with unfinished(target) as path:
        getattr(dataset, _WRITERS.get(Path(target).suffix, "save_to_disk"))(str(path))
