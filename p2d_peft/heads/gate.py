"""The `gate` method: how sensitive the loss is to a head's output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..model_state import model_device
from .gates import gated
from .geometry import ModelGeometry
from .gradients import gradients_of, summed
from .samples import Batch, nothing_counts, right_padded, rows_of, sample_losses
from .weights import LayerScores, require_only


def gate_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    Mean over samples of |gradient of the sample's loss for a gate of 1 on the head's output| (Michel et al., 2019,
    arXiv 1905.10650, equation 2, without their normalization of each layer).

    Each sample has gates of its own, so one forward and backward pass a batch gives the gradients of its samples, and no
    weight needs one: quantized models do. A sample's loss is the mean over its tokens that count. Dropout is off.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder, quantized or not.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0.

    Raises:
        `ValueError`: if no sample has a token that counts.
    """
    require_only(model, {})
    total, n_samples = summed(
        {layer: gradient.abs() for layer, gradient in one.items()}
        for batch in batches
        for one in gate_gradients(model, geometry, batch)
    )
    if not n_samples:
        raise nothing_counts()
    return {layer: values / n_samples for layer, values in total.items()}


def gate_gradients(model: nn.Module, geometry: ModelGeometry, batch: Batch) -> list[LayerScores]:
    """
    The signed gradients for the gates of each sample of one batch that has a token that counts.

    Args:
        model (`nn.Module`): The model, none of whose parameters requires a gradient.
        geometry (`ModelGeometry`): Its heads.
        batch (`Batch`): The batch.

    Returns:
        `list[LayerScores]`: one for each sample.
    """
    rows, device = rows_of(batch, model), model_device(model)
    if not rows:
        return []
    gates = {
        layer: torch.ones(len(rows), attention.n_heads, device=device, requires_grad=True)
        for layer, attention in geometry.items()
    }
    with gated(model, geometry, gates):
        # a sample's loss does not depend on the other samples' gates
        loss = sample_losses(model, right_padded(rows)).sum()
    found = gradients_of(loss, {geometry[layer].units("o").module: gate for layer, gate in gates.items()})
    gradients = [gradient.cpu().double() for gradient in found.values()]
    return [
        {layer: gradient[index] for layer, gradient in zip(gates, gradients, strict=True)}
        for index in range(len(rows))
    ]
