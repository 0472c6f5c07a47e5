"""The `taylor` method: first-order importance of a head's weights, in one forward and backward pass a sample."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .geometry import ModelGeometry
from .gradients import sample_gradients, summed
from .samples import Batch
from .weights import LayerScores, attention_weights, slice_sums


def taylor_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    Sum over samples and over a head's slices of q, k, v and o of |gradient x weight|, the first-order estimate of how
    the loss changes when a weight is removed (Molchanov et al., 2017, arXiv 1611.06440, applied to heads).

    The gradient is taken sample by sample, see [`sample_gradients`], and samples do not cancel one another.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0.

    Raises:
        `ValueError`: if no sample has a token that counts.
    """
    weights = attention_weights(model, geometry, "taylor")
    values = {name: weight.as_linear(weight.parameter.detach()) for name, weight in weights.items()}
    total, _ = summed(
        slice_sums(geometry, {name: (gradient * values[name]).abs() for name, gradient in gradients.items()})
        for gradients in sample_gradients(model, weights, batches)
    )
    return total
