"""Gradients sample by sample: the pass that `taylor`, `fisher`, `gain` and `agreement` share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from .samples import Batch, nothing_counts, sample_losses, single_rows
from .weights import AttentionWeights, LayerScores, require_only


def sample_gradients(
    model: nn.Module, weights: AttentionWeights, batches: Iterable[Batch]
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The gradients of one sample after the other, in one forward and backward pass each.

    A sample's loss is the mean over its tokens that count. A sample is run alone, without its padding, so that its
    gradients do not depend on how samples are batched. Dropout is off.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder; `preserved_state` is to be around this.
        weights (`AttentionWeights`): The weights to differentiate for.
        batches (`Iterable[Batch]`): The samples.

    Yields:
        `dict[str, torch.Tensor]`: by the name of the projection its weight's gradient, as a view of shape
        (out_features, in_features), in float32 or the weight's dtype if that is wider.

    Raises:
        `ValueError`: if no sample has a token that counts, or the loss does not depend on one of the weights.
    """
    require_only(model, weights)
    n_samples = 0
    for row in single_rows(batches, model):
        (loss,) = sample_losses(model, row)
        gradients = gradients_of(loss, {name: weight.parameter for name, weight in weights.items()})
        yield {
            name: weights[name].as_linear(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
            for name, gradient in gradients.items()
        }
        n_samples += 1
    if not n_samples:
        raise nothing_counts()


def gradients_of(loss: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The gradients of a loss for tensors, by their names, which every `.grad` of the model is left alone by.

    Raises:
        `ValueError`: if the loss does not depend on one of them; the message names the first one.
    """
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    gradients = dict(zip(tensors, found, strict=True))
    for name, gradient in gradients.items():
        if gradient is None:
            raise ValueError(
                f"The loss on `batches` does not depend on {name!r}: it did not run, as cross-attention to images does not on "
                "text alone, or an adapter runs in its place. Pass the part of the model that is meant, or merge the adapter."
            )
    return gradients


def summed(scores: Iterable[LayerScores]) -> tuple[LayerScores, int]:
    """The sum of the scores of several samples, and their number."""
    total: LayerScores = {}
    count = 0
    for one in scores:
        total = {layer: total[layer] + values if total else values for layer, values in one.items()}
        count += 1
    return total, count


def mean_gradients(model: nn.Module, weights: AttentionWeights, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """
    The mean of [`sample_gradients`]; takes the memory of one more float32 copy of the weights.

    Args:
        model (`nn.Module`), weights (`AttentionWeights`), batches (`Iterable[Batch]`): As there.
    """
    means: dict[str, torch.Tensor] = {}
    for count, gradients in enumerate(sample_gradients(model, weights, batches), start=1):
        if not means:
            means = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
        for name, gradient in gradients.items():
            means[name] += (gradient - means[name]) / count
    return means
