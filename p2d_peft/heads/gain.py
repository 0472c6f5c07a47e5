"""The methods `gain` and `gain_sgd`: how far the first optimizer step on a head's slices lowers the loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .geometry import ModelGeometry
from .gradients import mean_gradients
from .samples import Batch
from .weights import LayerScores, attention_weights, slice_sums


def gain_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    What Adam's first step on a head's slices of q, k, v and o promises: the L1 norm of the mean gradient there.

    Adam's first step moves each weight by `lr * sign(g)`, so to first order the loss falls by `lr * sum_w |g(w)|`, `g`
    being the gradient of the mean loss over samples. Ours. It asks what *training* the head would bring, where SNIP (Lee
    et al., 2019, arXiv 1810.02340: `|sum g w|`) and `taylor` ask what *removing* weights would cost: the weights
    themselves do not matter here, and samples that pull in opposite directions cancel, as they do in training. GraSP
    (Wang et al., 2020, arXiv 2002.07376) starts from `gain_sgd`'s `||g||^2`, and asks how removing weights changes it,
    which takes a Hessian-vector product.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0; times a small learning rate the decrease of the mean loss.

    Raises:
        `ValueError`: if no sample has a token that counts.
    """
    means = mean_gradients(model, attention_weights(model, geometry, "gain"), batches)
    return slice_sums(geometry, {name: mean.abs() for name, mean in means.items()})


def gain_sgd_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    What a step of plain gradient descent on a head's slices promises: the squared L2 norm of the mean gradient there.

    The step moves each weight by `lr * g`, so to first order the loss falls by `lr * sum_w g(w)^2`. See [`gain_scores`]
    for the rest.

    Args:
        model (`nn.Module`), geometry (`ModelGeometry`), batches (`Iterable[Batch]`), seed (`int`): As there.
    """
    means = mean_gradients(model, attention_weights(model, geometry, "gain_sgd"), batches)
    return slice_sums(geometry, {name: mean.square() for name, mean in means.items()})
