"""The `magnitude` method: how large a head's weights are, a control that knows nothing of the task."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .geometry import ModelGeometry
from .samples import Batch
from .weights import LayerScores, attention_weights, slice_sums


def magnitude_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    The Frobenius norm of a head's slices of q, k, v and o taken together (magnitude pruning, Han et al., 2015,
    arXiv 1506.02626, applied to heads). No pass is made and no batch is read.

    Args:
        model (`nn.Module`): Any model with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): Not used.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0.
    """
    weights = attention_weights(model, geometry, "magnitude")
    squares = {name: weight.as_linear(weight.parameter.detach().float().square()) for name, weight in weights.items()}
    return {layer: values.sqrt() for layer, values in slice_sums(geometry, squares).items()}
