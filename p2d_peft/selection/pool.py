"""Rows of a pool: in the order of their scores, by their numbers, and as what a selection returns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets
from datasets.table import InMemoryTable

from ..dataset_files import holds_type
from .progress import quiet_datasets


SCORE_COLUMN = "p2d_score"
# Rows of a stream that are Python's objects at the same time.
ROWS_AT_ONCE = 1024


def ranked(scores: torch.Tensor) -> list[int]:
    """The rows that have a score, the best first; of equal ones the lower row number first."""
    order: list[int] = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True).tolist()
    n_scored = int((~scores.isnan()).sum())
    return order[:n_scored]


def in_memory(dataset: Dataset) -> Dataset:
    """
    The rows without the dataset's files. What is made of them stays in memory, and is not written to a cache beside
    those files.
    """
    # as Arrow holds them: of Python's numbers `datasets` cannot make all of Arrow's, and images would be decoded
    table = dataset.with_format(None).with_format("arrow")[:]
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=dataset.features))


def rows_of(pool: Dataset | IterableDataset, rows: list[int]) -> Dataset:
    """Some rows of a pool, at least one, in ascending order. A stream is read up to the last of them."""
    if isinstance(pool, Dataset):
        return pool.select(rows)
    wanted = set(rows)
    stream = islice(pool.with_format(None), rows[-1] + 1)
    parts: list[Dataset] = []
    found: list[dict[str, Any]] = []
    for index, row in enumerate(stream):
        if index in wanted:
            found.append(row)
        # as Arrow they take a fraction of the memory; without a schema it is all rows together that tell their types
        if len(found) == ROWS_AT_ONCE and pool.features is not None:
            parts.append(dataset_of(found, pool))
            found = []
    n_found = sum(map(len, parts)) + len(found)
    if n_found < len(rows):
        raise ValueError(
            f"`pool` gave no row {rows[n_found]} this time: a stream has to give the same rows each time that it is "
            "read. Shuffle it with a seed, or make a `Dataset` of it."
        )
    if found:
        parts.append(dataset_of(found, pool))
    return concatenate_datasets(parts)


def dataset_of(rows: list[dict[str, Any]], stream: IterableDataset) -> Dataset:
    """Rows of a stream as a dataset. What the stream does not say of its types is found out from the rows."""
    # `from_list` would take the first row's columns for all
    names = stream.features or dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    if stream.features is not None:
        for field in stream.features.arrow_schema:
            # `from_dict` takes all integers for signed ones first, which the upper half of these do not fit into
            if holds_type(field.type, pa.types.is_uint64):
                encoded = stream.features.encode_column(columns[field.name], field.name)
                columns[field.name] = pa.array(encoded, field.type)
        return Dataset.from_dict(columns, features=stream.features)
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def check_column(pool: Dataset | IterableDataset, name: str) -> None:
    """Check that a pool has a column, as far as it says without being read."""
    names = pool.column_names
    if names is not None and name not in names:
        raise ValueError(f"`pool` has no column {name!r}, only {names}.")


def column_of(pool: Dataset | IterableDataset, name: str) -> list[Any]:
    """The values of a column in all rows of a pool. Of a stream without a schema, None where a row lacks it."""
    check_column(pool, name)
    if isinstance(pool, Dataset):
        values: list[Any] = pool.with_format(None)[name][:]
        return values
    values = [row.get(name) for row in pool.with_format(None)]
    if all(value is None for value in values):
        raise ValueError(f"`pool` has no value in the column {name!r}.")
    return values


def kept_rows(kept: Dataset, scores: list[float]) -> Dataset:
    """Rows with their scores in the column `p2d_score`, which replaces that of an earlier selection."""
    if SCORE_COLUMN in kept.column_names:
        kept = kept.remove_columns(SCORE_COLUMN)
    with quiet_datasets():
        return kept.add_column(SCORE_COLUMN, scores)


def extremes(pool: Dataset, scores: torch.Tensor, n: int = 10) -> Dataset:
    """
    The rows with the highest and the lowest scores, to read.

    Args:
        pool (`Dataset`): The pool.
        scores (`torch.Tensor`): Shape (rows,), as [`P2DDataSelector.score`] returns them.
        n (`int`, *optional*, defaults to 10): How many of each; all rows once, if there are fewer than twice as many.

    Returns:
        `Dataset`: the rows from the best to the worst, with the columns `p2d_row` (their number) and `p2d_score`.
    """
    order = ranked(scores)
    chosen = order if len(order) <= 2 * n else order[:n] + order[-n:]
    shown = kept_rows(pool.select(chosen), scores[chosen].tolist())
    return shown.remove_columns([c for c in shown.column_names if c == "p2d_row"]).add_column("p2d_row", chosen)


def shortened(rows: Sequence[int], most: int = 10) -> str:
    """The numbers of rows, for messages."""
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
