"""The reference that the AER is relative to, in terms of a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..efficiency import Reference, estimate_reference
from ..model_state import model_device, preserved_state
from ..selection.pool import dataset_of
from .config import P2DConfig


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)


def find_reference(
    trainer: P2DTrainer, pool: Dataset | IterableDataset, pool_rows: int | None, pool_tokens: int | None
) -> Reference | None:
    """
    The reference as the user gave it, or estimated from a few steps if that is wanted and possible. It is no stage of
    the method and charged to none.

    Args:
        trainer (`P2DTrainer`): A trainer before its adapter is attached; its model, flags and random numbers stay.
        pool (`Dataset` or `IterableDataset`): The whole tokenized pool.
        pool_rows (`int`, *optional*): Its rows. Where they are unknown, nothing can be estimated.
        pool_tokens (`int`, *optional*): Its tokens.
    """
    args: P2DConfig = trainer.args
    if args.reference_seconds is not None:
        return Reference(args.reference_seconds / args.num_train_epochs, "given")
    if args.reference_steps == 0 or pool_rows is None or pool_tokens is None:
        return None
    model, size = trainer.model, args.per_device_train_batch_size
    device = model_device(model)
    count = min(pool_rows, (args.reference_steps + 1) * size)
    if isinstance(pool, IterableDataset):
        drawn = dataset_of(list(pool.take(count)), pool)
    else:
        drawn = pool.shuffle(seed=args.seed).select(range(count))
    batches = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in training_batches(drawn, size, trainer.pad_token_id)
    ]
    optimizer_class, optimizer_kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args)

    def training_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with trainer.accelerator.autocast():
            loss: torch.Tensor = model(**batch, use_cache=False, fused_lm_head=True).loss
        return loss

    try:
        with preserved_state(model), _checkpointing_as_in_training(model, args):
            model.train()
            return estimate_reference(
                model,
                batches,
                training_loss,
                lambda parameters: optimizer_class(parameters, **optimizer_kwargs),
                pool_tokens=pool_tokens,
                steps_per_epoch=max(1, round(pool_rows / (size * args.gradient_accumulation_steps))),
            )
    except (ValueError, torch.OutOfMemoryError) as error:
        logger.warning(
            "The reference could not be estimated, so there will be no AER: %s Pass `reference_seconds` if you have "
            "measured it, or `reference_steps=0` to go without.",
            error,
        )
        return None


@contextmanager
def _checkpointing_as_in_training(model: Any, args: P2DConfig) -> Iterator[None]:
    """Switch activation checkpointing on as `Trainer.train` would, and off again."""
    if not args.activation_checkpointing or model.is_activation_checkpointing:
        yield
        return
    kwargs = dict(args.activation_checkpointing_kwargs or {})
    every_n_layers, offload = kwargs.pop("every_n_layers", 1), kwargs.pop("offload", False)
    model.activation_checkpointing_enable(kwargs or None, every_n_layers=every_n_layers, offload=offload)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def training_batches(dataset: Dataset, size: int, pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """
    The batches of a prepared dataset as the training would make them, but never padding-free, which only
    FlashAttention can tell apart into rows.

    Returns:
        `list[dict[str, torch.Tensor]]`: `input_ids`, `attention_mask` and `labels` of shape (size, T), int64.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)
    columns = [column for column in ("input_ids", "labels") if column in dataset.column_names]
    rows = dataset.select_columns(columns).with_format(None).to_list()
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def count_tokens(dataset: Dataset) -> int:
    """Tokens of a prepared dataset."""
    return sum(map(len, dataset.with_format(None)["input_ids"]))
