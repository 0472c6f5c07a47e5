"""The `random` control: scores that know nothing. A method that does not beat it has found nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .geometry import ModelGeometry
from .weights import Batch


def random_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> torch.Tensor:
    """Independent uniform scores in [0, 1) from `seed`, shape (L, H); looks at neither the model nor the batches."""
    return torch.rand(geometry.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
