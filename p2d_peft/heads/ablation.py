"""The `ablation` method: what the loss is without a head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..model_state import model_device
from .gates import gated
from .geometry import ModelGeometry
from .lower_layers import LowerLayers
from .samples import Batch, nothing_counts, right_padded, rows_of, sample_losses
from .weights import LayerScores, require_only


@torch.no_grad()
def ablation_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    The exact change of the mean loss over samples when a head's output is set to zero (Michel et al., 2019,
    arXiv 1905.10650, section 3), which `gate` estimates: high for a head that the task needs, negative for one that is
    in its way.

    A sample's loss is the mean over its tokens that count. Dropout is off. It takes one forward pass for each head, and
    one more, over all batches, through the layers from the head's one on: what the layers below put out is kept. With 300
    heads that is about as long as 60 passes with gradients.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder, quantized or not.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: of either sign.

    Raises:
        `ValueError`: if no sample has a token that counts.
    """
    require_only(model, {})
    changes = {layer: torch.zeros(attention.n_heads, dtype=torch.float64) for layer, attention in geometry.items()}
    n_samples = 0
    for given in batches:
        rows = rows_of(given, model)
        if not rows:
            continue
        batch = right_padded(rows)
        whole = sample_losses(model, batch).cpu().double()
        for layer, attention in geometry.items():
            lower = LowerLayers(model, attention, batch)
            gates = torch.ones(1, attention.n_heads, device=model_device(model))
            with gated(model, geometry, {layer: gates}):
                for head in range(attention.n_heads):
                    gates[0, head] = 0
                    with lower.kept(batch):
                        losses = sample_losses(model, batch).cpu().double()
                    changes[layer][head] += (losses - whole).sum()
                    gates[0, head] = 1
        n_samples += len(rows)
    if not n_samples:
        raise nothing_counts()
    return {layer: change / n_samples for layer, change in changes.items()}
