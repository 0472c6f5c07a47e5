"""The `taylor` method: first-order importance of a head's weights, in one forward and backward pass a sample."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .geometry import ROLES, ModelGeometry
from .weights import Batch, attention_weights, head_sums, nothing_counts, require_only, single_rows, unit_sums


def taylor_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> torch.Tensor:
    """
    Sum over samples and over a head's slices of q, k, v and o of |gradient x weight|, the first-order estimate of how
    the loss changes when a weight is removed (Molchanov et al., 2017, arXiv 1611.06440, applied to heads).

    The gradient is taken sample by sample, so that the scores do not depend on how samples are batched and samples do
    not cancel one another. A sample's loss is the mean over its tokens that count. Dropout is off; `seed` is not used.

    Args:
        model (`nn.Module`): Causal language model with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `torch.Tensor`: shape (L, H), float64, NaN where there is no head.

    Raises:
        `ValueError`: if no sample has a token that counts.
    """
    weights = attention_weights(model, geometry, "taylor")
    require_only(model, weights)
    parts = [(layer, role, attention.units(role)) for layer, attention in geometry.items() for role in ROLES]
    sums = {
        (layer, role): torch.zeros(
            len(units.starts), dtype=torch.float64, device=weights[units.module].parameter.device
        )
        for layer, role, units in parts
    }
    n_samples = 0
    for row in single_rows(batches, model):
        loss = model(**row, use_cache=False).loss
        # autograd.grad leaves every .grad of the model alone
        gradients = torch.autograd.grad(loss, [weight.parameter for weight in weights.values()])
        products = {
            name: weight.as_linear((gradient * weight.parameter.detach()).abs())
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        for layer, role, units in parts:
            sums[layer, role] += unit_sums(products[units.module], units)
        n_samples += 1
    if not n_samples:
        raise nothing_counts()
    scores = torch.full(geometry.shape, torch.nan, dtype=torch.float64)
    for layer, attention in geometry.items():
        scores[layer, : attention.n_heads] = head_sums(attention, {role: sums[layer, role] for role in ROLES}).cpu()
    return scores
