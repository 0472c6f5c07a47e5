"""The `fisher` method: how much the loss of single samples depends on a head's weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .geometry import ModelGeometry
from .gradients import sample_gradients, summed
from .samples import Batch
from .weights import LayerScores, attention_weights, slice_sums


def fisher_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    The mass of the diagonal of the empirical Fisher information on a head's slices of q, k, v and o:
    `mean_s sum_w g_s(w)^2`, the squares of each sample's gradients, summed over the slices and averaged over samples
    (the diagonal as in Kirkpatrick et al., 2017, arXiv 1612.00796, and as a mask in Sung et al., 2021,
    arXiv 2111.09839; the sum over a head is ours).

    It is *empirical*: the gradients are those of the given labels, not of labels drawn from the model. A sample's loss is
    the mean over its tokens that count, see [`sample_gradients`].

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
    weights = attention_weights(model, geometry, "fisher")
    total, n_samples = summed(
        slice_sums(geometry, {name: gradient.square() for name, gradient in gradients.items()})
        for gradients in sample_gradients(model, weights, batches)
    )
    return {layer: values / n_samples for layer, values in total.items()}
