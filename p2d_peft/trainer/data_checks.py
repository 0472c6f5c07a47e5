"""What can be wrong with the datasets of a run in relation to one another and to the model, told of before the stages."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..model_checks import check_vocabulary


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

_ROWS = 1024


def check_datasets(trainer: P2DTrainer, pool: Any) -> None:
    """
    Check a run's tokenized datasets, as far as they are no streams.

    What a run is evaluated on should be new to it. That it is not is a warning: to choose heads and rows for the very
    samples of a validation set, say, is what some mean to do.

    Args:
        trainer (`P2DTrainer`): A trainer before its stages.
        pool (`Dataset` or `IterableDataset`): Its pool.

    Raises:
        `ValueError`: if the pool holds a token that the model does not know.
    """
    found = trainer.eval_dataset
    evaluated = found if isinstance(found, dict) else {} if found is None else {"": found}
    counts = {name: Counter(row_digests(dataset)) for name, dataset in evaluated.items()}
    in_pool: dict[str, set[bytes]] = {name: set() for name in counts}
    for values, offsets in _tokens(pool):
        if len(values):
            check_vocabulary("train_dataset", int(values.min()), int(values.max()), trainer.model)
        if any(counts.values()):
            digests = set(_digests_of(values, offsets))
            for name, count in counts.items():
                in_pool[name] |= digests & count.keys()
    in_target = set(row_digests(trainer.target_dataset)) if any(counts.values()) else set()
    for name, count in counts.items():
        argument = f"eval_dataset['{name}']" if name else "eval_dataset"
        if rows := sum(count[digest] for digest in in_pool[name]):
            logger.warning(
                "%d of the %d rows of `%s` are in `train_dataset`, too, where they can be selected and learned by heart; they "
                "say little about other rows. Leave them out of one of the two.",
                rows,
                count.total(),
                argument,
            )
        if rows := sum(count[digest] for digest in in_target & count.keys()):
            logger.warning(
                "%d of the %d rows of `%s` are in `target_dataset`, too: heads and rows are chosen for these very rows, so "
                "that they are no test of the choice. Give other samples of the task as the target.",
                rows,
                count.total(),
                argument,
            )


def _tokens(dataset: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For parts of a tokenized dataset, the token ids of all rows in one array and where in it each row begins and ends."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    # through Arrow: lists of Python would take longer than all else that is done here
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(_ROWS):
        column = table.column("input_ids").combine_chunks()
        if pa.types.is_fixed_size_list(column.type):  # which needs no offsets
            column = column.cast(pa.list_(column.type.value_type))
        yield column.values.to_numpy(zero_copy_only=False).astype(np.int64), column.offsets.to_numpy()


def _digests_of(values: np.ndarray, offsets: np.ndarray) -> Iterator[bytes]:
    for start, end in pairwise(offsets):
        yield hashlib.blake2b(values[start:end].tobytes(), digest_size=16).digest()


def row_digests(dataset: Any) -> Iterator[bytes]:
    """What tells rows apart, without their tokens."""
    for values, offsets in _tokens(dataset):
        yield from _digests_of(values, offsets)
