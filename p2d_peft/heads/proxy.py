"""The `proxy` method, the paper's: train all heads for a moment and see which weights move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..model_state import model_device
from .geometry import ModelGeometry, Role
from .samples import IGNORED, Batch, nothing_counts, predicted
from .weights import LayerScores, attention_weights, head_slices, require_only


# Ours: the paper's text was not available. Large enough to move weights in about 100 samples, small enough to keep
# the run in the neighbourhood of the pretrained weights.
LEARNING_RATE = 1e-4
# ALPS' score looks at these; the output projection is trained along but not scored
SCORED_ROLES: tuple[Role, ...] = ("q", "k", "v")


def proxy_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    A short proxy run over the batches (P2D section 3.2.1), then the distance of each head's weights before and after.

    The run trains the q, k, v and o weights of all heads, one AdamW step a batch, without weight decay and without
    dropout (`seed` is not used). The optimizer works on float32 copies, so that a bf16 model moves, too; afterwards the
    model's weights are put back bit for bit. Memory: about 7 x 4 bytes for each attention weight.

    The distance is ALPS' parameter-alignment distribution score (arXiv 2505.18799): the Wasserstein-1 distance of
    `softmax(W_q W_k^T W_v)` before and after, see [`weight_shift`].

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples; one pass.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: at least 0.

    Raises:
        `ValueError`: if no batch has a token that counts.
    """
    weights = attention_weights(model, geometry, "proxy")
    device = model_device(model)
    require_only(model, weights)

    parameters = {name: weight.parameter for name, weight in weights.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    masters = {name: nn.Parameter(p.detach().to(torch.float32, copy=True)) for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = 0
    try:
        for batch in batches:
            if not (predicted(model, batch["labels"]) != IGNORED).any():
                continue
            loss = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad = gradient.float()
            optimizer.step()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(masters[name])
            steps += 1
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    if not steps:
        raise nothing_counts()

    scores: LayerScores = {}
    for layer, attention in geometry.items():
        shifts = []
        for head in range(attention.n_heads):
            old, new = (head_slices(weights, attention, head, tensors) for tensors in (before, masters))
            shifts.append(
                weight_shift([old[role] for role in SCORED_ROLES], [new[role].detach() for role in SCORED_ROLES])
            )
        scores[layer] = torch.tensor(shifts, dtype=torch.float64)
    return scores


def weight_shift(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """
    ALPS' distance of one head's weights before and after: the Wasserstein-1 distance between the two distributions
    `softmax(W_q W_k^T W_v)` over the entries of the product.

    With `W_q`, `W_k`, `W_v` of shape (hidden, D) the product has shape (hidden, D); taken from the right it needs only
    the D x D matrix `W_k^T W_v`, never one of hidden x hidden. As in ALPS' published code, entry `j` of the flattened
    product lies at `j / (n - 1)` on the unit interval, so the distance is the mean gap between the cumulative sums. Its
    K and V are those of the head's group, as the paper says (the published code takes the query head's index).

    Ours: where a query has more rows than its key, an output gate (Qwen3-Next) or a part whose key all heads share
    (latent attention), those come last and are left out, as there is no row of the key to pair them with.

    Args:
        before (`list[torch.Tensor]`): The head's rows of the weights of q, k and v, each of shape (D, hidden).
        after (`list[torch.Tensor]`): The same after the run.

    Returns:
        `float`: the distance, at least 0, and 0 for equal weights.
    """

    def distribution(slices: list[torch.Tensor]) -> torch.Tensor:
        w_q, w_k, w_v = (part.double() for part in slices)
        return torch.softmax((w_q[: len(w_k)].T @ (w_k @ w_v.T)).flatten(), dim=0)

    gaps = torch.cumsum(distribution(after) - distribution(before), dim=0).abs()
    return float(gaps.sum() / max(gaps.numel() - 1, 1))
