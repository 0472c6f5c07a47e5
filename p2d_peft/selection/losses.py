"""The loss of each sample of a batch by itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .samples import Samples
from .scoring import ScoringContext


def mean_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The mean negative log-likelihood of each sample's tokens that count.

    Args:
        model (`nn.Module`): The causal language model.
        batch (`dict[str, torch.Tensor]`): `input_ids`, `attention_mask` and `labels` of shape (B, T), int64.

    Returns:
        `torch.Tensor`: shape (B,), float32, nats a token, on the model's device.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return label_losses(logits, labels)


def label_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over each row's labels other than -100: shape (B,), float32; logits are not shifted."""
    losses = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels_BT != -100).sum(1)


def losses_of(context: ScoringContext, samples: Samples) -> torch.Tensor:
    """The mean loss of each sample, in one forward pass: shape (len(samples),), float32, nats a token, on the CPU."""
    losses = torch.empty(len(samples))
    for indices, batch in context.batches(samples):
        losses[indices] = mean_losses(context.model, batch).cpu()
    return losses
