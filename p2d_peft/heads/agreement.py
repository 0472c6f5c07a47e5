"""The `agreement` method: whether the samples want the same change of a head's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .geometry import ModelGeometry
from .gradients import sample_gradients
from .samples import Batch
from .weights import LayerScores, attention_weights, slice_sums


def agreement_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    Signal to noise of the samples' gradients on a head's slices of q, k, v and o:
    `||mean_s g_s||^2 / mean_s ||g_s - mean||^2`, both summed over all weights of the slices.

    It is the inverse of the simple noise scale of McCandlish et al. (2018, arXiv 1812.06162) for one head: high where
    what one sample would change helps the others, low where each pulls elsewhere. The size of the gradients cancels. A
    head without any gradient scores 0. With few samples the noise that is left in the mean adds about `1 / samples` to
    each score.

    Mean and noise are updated sample by sample (Welford, 1962), so that the memory is one more copy of the weights in
    float32 and another for the noise.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples; at least two that differ.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0.

    Raises:
        `ValueError`: if no sample, or only one, has a token that counts, or all samples have the same gradients.
    """
    weights = attention_weights(model, geometry, "agreement")
    means: dict[str, torch.Tensor] = {}
    noise: dict[str, torch.Tensor] = {}
    n_samples = 0
    for gradients in sample_gradients(model, weights, batches):
        n_samples += 1
        for name, gradient in gradients.items():
            mean = means.setdefault(name, torch.zeros_like(gradient))
            to_old_mean = gradient - mean
            mean += to_old_mean / n_samples
            noise.setdefault(name, torch.zeros_like(gradient)).addcmul_(to_old_mean, gradient - mean)
    if n_samples == 1:
        raise ValueError(
            "`method`='agreement' compares the gradients of samples, but `batches` holds one with a token that counts; "
            "give at least two, better about 100."
        )
    signal = slice_sums(geometry, {name: mean.square() for name, mean in means.items()})
    spread = {layer: values / n_samples for layer, values in slice_sums(geometry, noise).items()}
    if any(((spread[layer] <= 0) & (signal[layer] > 0)).any() for layer in geometry):
        raise ValueError(
            "`method`='agreement' compares the gradients of samples, but those of all samples in `batches` are the same; "
            "give samples that differ."
        )
    # 0 / 0 is a head without a gradient; a gradient that is not a number stays one, and is reported as such
    return {layer: torch.where(signal[layer] == 0, 0.0, signal[layer] / spread[layer]) for layer in geometry}
