"""Datasets by name: what `load_dataset` and `load_from_disk` read, and `save_to_disk`, Parquet, JSON lines and CSV write."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_WRITERS = {".jsonl": "to_json", ".parquet": "to_parquet", ".csv": "to_csv"}


def read_dataset(source: str) -> Dataset:
    """
    Read a dataset.

    Args:
        source (`str`): A file (`.jsonl`, `.json`, `.parquet`, `.csv`), a folder that `save_to_disk` wrote, or what
            `load_dataset` takes, with `:split` behind it where that is not `train`.

    Raises:
        `ValueError`: if a folder holds several splits and none is named.
    """
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{source}'.")
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    name, _, split = source.rpartition(":") if ":" in source else (source, "", "")
    if Path(name).is_dir() and (Path(name, "state.json").exists() or Path(name, "dataset_dict.json").exists()):
        loaded = load_from_disk(name)
        if not isinstance(loaded, DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(f"'{name}' has the splits {', '.join(loaded)}; name one: '{name}:{next(iter(loaded))}'.")
        return loaded[split]
    return load_dataset(name, split=split or "train")


def check_new(target: str | Path) -> None:
    """
    Check, before any work, that a dataset can be written to `target`.

    Raises:
        `ValueError`: if something is there already: a selection may have taken hours.
    """
    if Path(target).exists():
        raise ValueError(f"'{target}' exists already; give another name, or move it away.")


def write_dataset(dataset: Dataset, target: str | Path) -> None:
    """
    Write a dataset, in full or not at all: to a `.jsonl`, `.parquet` or `.csv` file by its ending, otherwise as a folder
    for `load_from_disk`.

    Raises:
        `ValueError`: if `target` exists.
    """
    check_new(target)
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        if target.suffix in _WRITERS:
            getattr(dataset, _WRITERS[target.suffix])(str(unfinished / "data"))
            os.replace(unfinished / "data", target)
        else:
            dataset.save_to_disk(str(unfinished / "data"))
            os.replace(unfinished / "data", target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
