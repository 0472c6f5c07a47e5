"""Losses of samples, each by itself."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..heads.samples import sample_losses
from .samples import Samples
from .scoring import ScoringContext


def label_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over each row's labels other than -100: shape (B,), float32; logits are not shifted."""
    losses = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels_BT != -100).sum(1)


def losses_of(context: ScoringContext, samples: Samples) -> torch.Tensor:
    """The mean loss of each sample, in one forward pass: shape (len(samples),), float32, nats a token, on the CPU."""
    return context.of_each(samples, lambda batch: sample_losses(context.model, batch)).float()
