"""A trainer's dataset as what its model gets to see of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, get_dataset_column_names

from ..selection.progress import quiet_datasets


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer


def tokenized(trainer: P2DTrainer, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    A dataset whose columns `input_ids` and `labels` are what the training makes of each row: as they are, where TRL's own
    collator takes them from there, else through the user's collator, one row at a time. Other columns stay.

    Args:
        trainer (`P2DTrainer`): A trainer.
        dataset (`Dataset` or `IterableDataset`): Rows as its collator gets them.
    """
    is_plain = isinstance(dataset, IterableDataset) or dataset.format["type"] != "custom"
    collator = trainer.data_collator
    if is_plain and type(collator) is DataCollatorForLanguageModeling:
        if "input_ids" in get_dataset_column_names(dataset):
            return dataset
    collator = trainer._get_collator_with_removed_columns(collator, description="training")
    row_by_row = {"fn_kwargs": {"collator": collator}}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_collated, **row_by_row)
    with quiet_datasets():
        # A transform is applied as rows are read. The result is made anew each time: a collator may do anything.
        mapped: Dataset = dataset.map(_collated, keep_in_memory=True, load_from_cache_file=False, **row_by_row)
        return mapped.with_format(None)


def _collated(row: dict[str, Any], collator: Callable[[list[dict[str, Any]]], Any]) -> dict[str, list[int]]:
    batch = collator([dict(row)])  # `map` gives a view, of which Trainer would not drop a column
    if "input_ids" not in batch:
        raise ValueError(
            f"`data_collator` gives batches with {sorted(batch)}; rows can only be scored where there are 'input_ids'. "
            "Bring the rows you want as `train_dataset` and set `data_ratio=1.0`."
        )
    input_ids = batch["input_ids"][0].tolist()
    labels = (batch["labels"] if "labels" in batch else batch["input_ids"])[0].tolist()
    mask = batch["attention_mask"][0].tolist() if "attention_mask" in batch else [1] * len(input_ids)
    return {
        name: [value for value, real in zip(values, mask, strict=True) if real]
        for name, values in (("input_ids", input_ids), ("labels", labels))
    }
