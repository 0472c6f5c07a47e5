"""The samples that heads are localized on: batches, their rows without padding, and the loss of each row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from ..model_state import model_device


# What the model takes as keyword arguments: input_ids and attention_mask of shape (B, T), int64, and labels, -100 on
# tokens that do not count: of shape (B, T) for causal language models, (B, tokens of the decoder) for encoder-decoders.
# Without an attention_mask, position_ids of shape (B, T) that start anew at 0 say that a row holds several samples.
Batch: TypeAlias = Mapping[str, torch.Tensor]
IGNORED = -100


def nothing_counts() -> ValueError:
    """The error for batches without a single token to learn from."""
    return ValueError("`batches` holds no sample with a token that counts (a label other than -100).")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are what a decoder says about the input, and not the input itself shifted by one."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicted(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """The labels that a model predicts: all in an encoder-decoder, all but the first token's in a causal model."""
    return labels if is_encoder_decoder(model) else labels[:, 1:]


def rows_of(batch: Batch, model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """
    The rows of a batch as batches of one, without their padding, on the model's device; of packed rows, each of their samples.

    Rows without a token that counts are left out: they have no loss. An encoder-decoder's labels end with the last one
    that counts; what comes after it cannot change the loss.

    Args:
        batch (`Batch`): The batch.
        model (`nn.Module`): The model that it is for.
    """
    device = model_device(model)
    rows = []
    for index in range(batch["input_ids"].shape[0]):
        for kept in _samples_of_row(batch, index):
            input_ids, labels = batch["input_ids"][index][kept], batch["labels"][index]
            if is_encoder_decoder(model):
                counted = (labels != IGNORED).nonzero()
                labels = labels[: int(counted[-1]) + 1] if len(counted) else labels
            else:
                labels = labels[kept]
            row = {"input_ids": input_ids[None].to(device), "labels": labels[None].to(device)}
            if (predicted(model, row["labels"]) != IGNORED).any():
                rows.append({**row, "attention_mask": torch.ones_like(row["input_ids"])})
    return rows


def _samples_of_row(batch: Batch, index: int) -> list[slice | torch.Tensor]:
    """Where the samples of a row are: what the mask keeps, or from one start of the positions to the next."""
    if batch.get("attention_mask") is not None:
        return [batch["attention_mask"][index].bool()]
    positions = batch.get("position_ids")
    if positions is None or positions.shape != batch["input_ids"].shape:
        return [slice(None)]
    starts = [0, *(positions[index, 1:] == 0).nonzero().flatten().add(1).tolist()]
    return [slice(*pair) for pair in itertools.pairwise([*starts, None])]


def single_rows(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of all batches, see [`rows_of`]."""
    for batch in batches:
        yield from rows_of(batch, model)


def right_padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Rows in one batch, padded on the right, so that a row's positions are those that it has alone.

    Args:
        rows (`list[dict[str, torch.Tensor]]`): What [`rows_of`] gives; at least one.
    """
    # any token will do where the mask is 0 and the label is ignored
    paddings = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        key: nn.utils.rnn.pad_sequence([row[key][0] for row in rows], batch_first=True, padding_value=padding)
        for key, padding in paddings.items()
    }


def sample_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    The loss of each row: the mean cross-entropy over its tokens that count.

    Unlike the model's own loss it does not weigh a row by its number of tokens, and stays in the precision of the logits
    where that is above float32.

    Args:
        model (`nn.Module`): A causal language model or an encoder-decoder.
        batch (`Batch`): What [`right_padded`] gives.

    Returns:
        `torch.Tensor`: shape (B,), float32 or the logits' dtype.
    """
    losses = token_losses(model, batch)
    return losses.sum(dim=1) / (predicted(model, batch["labels"]) != IGNORED).sum(dim=1).to(losses.device)


def token_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """
    The cross-entropy of each token that counts, 0 for the others.

    A causal language model's LM head runs on the positions that predict a token that counts, and on no others: of a small
    model it is a third of the work, and a large vocabulary's logits take much memory.

    Args:
        model (`nn.Module`), batch (`Batch`): As in [`sample_losses`].

    Returns:
        `torch.Tensor`: shape (B, tokens that are predicted), float32 or the logits' dtype.
    """
    labels = predicted(model, batch["labels"])
    counts = labels != IGNORED
    if is_encoder_decoder(model):
        # it makes the decoder's input of the labels, and a loss of its own of all logits
        logits, seen = model(**batch, use_cache=False).logits, []
    else:
        with head_on_counted(model, nn.functional.pad(counts, (0, 1))) as seen:
            logits = model(**{key: batch[key] for key in batch if key != "labels"}, use_cache=False).logits
    counts = counts.to(logits.device)
    # those of virtual tokens (prompt tuning) come first
    first = logits.shape[1] - batch["labels"].shape[1]
    logits = logits[0] if seen else logits[:, first : first + labels.shape[1]][counts]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, labels.to(logits.device)[counts].long(), reduction="none")
    return torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device).masked_scatter(counts, losses)


@contextmanager
def head_on_counted(model: nn.Module, counts: torch.Tensor) -> Iterator[list[bool]]:
    """
    Context in which the LM head gets the positions that count alone, as one row; what comes after it (a scale, a bias, a
    soft cap) takes each position for itself. Yields a list that is empty as long as that was not done: where a model
    calls no such module, or on positions of its own.

    Args:
        model (`nn.Module`): A causal language model.
        counts (`torch.Tensor`): Which positions do, shape (B, T), bool.
    """
    done: list[bool] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != counts.shape:
            return None
        done.append(True)
        return (args[0][counts.to(args[0].device)][None], *args[1:])

    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if get_output_embeddings is None else get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()
