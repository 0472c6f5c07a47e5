"""The `random` control: scores that know nothing. A method that does not beat it has found nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .geometry import ModelGeometry
from .samples import Batch
from .weights import LayerScores


def random_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """Independent uniform scores in [0, 1) from `seed`; looks at neither the model's weights nor the batches."""
    table = torch.rand(geometry.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = dict(zip(geometry.rows, table, strict=True))
    return {layer: rows[layer][: attention.n_heads] for layer, attention in geometry.items()}
