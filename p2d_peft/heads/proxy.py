"""The `proxy` method, the paper's: train all heads for a moment and see which weights move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..model_state import model_device, where_float64_is
from .geometry import AttentionGeometry, ModelGeometry, Role
from .gradients import gradients_of
from .samples import IGNORED, Batch, nothing_counts, predicted, token_losses
from .weights import AttentionWeights, LayerScores, attention_weights, head_slices, require_only


# Ours: the paper's text was not available. Large enough to move weights in about 100 samples, small enough to keep
# the run in the neighbourhood of the pretrained weights.
LEARNING_RATE = 1e-4
# ALPS' score looks at these; the output projection is trained along but not scored
SCORED_ROLES: tuple[Role, ...] = ("q", "k", "v")
# A batch's rows pass so many tokens at a time, padding included: with the activations of a whole batch the run took half as
# much memory again as training the chosen heads does (8 billion weights, 16 rows).
TOKENS_AT_ONCE = 1024


def proxy_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    A short proxy run over the batches (P2D section 3.2.1), then the distance of each head's weights before and after.

    The run trains the q, k, v and o weights of all heads, one AdamW step a batch, without weight decay and without
    dropout (`seed` is not used). The optimizer works on float32 copies, so that a bf16 model moves, too; afterwards the
    model's weights are put back bit for bit. Memory: about 20 bytes for each attention weight, and the activations of
    `TOKENS_AT_ONCE` tokens, or of a row.

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
    require_only(model, weights)

    parameters = {name: weight.parameter for name, weight in weights.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    # of a float32 model the weights themselves
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in parameters.items()}
    # the other implementations keep a copy of all weights while they step
    fused = all(master.is_cuda for master in masters.values()) or None
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    steps = 0
    try:
        for batch in batches:
            n_counted = int((predicted(model, batch["labels"]) != IGNORED).sum())
            if not n_counted:
                continue
            optimizer.zero_grad()
            _add_gradients(model, parameters, masters, batch, n_counted)
            optimizer.step()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(masters[name])
            steps += 1
        if not steps:
            raise nothing_counts()
        optimizer.zero_grad()
        return {
            layer: weight_shift(*(_scored_weights(weights, attention, tensors) for tensors in (before, masters)))
            for layer, attention in geometry.items()
        }
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _add_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    masters: dict[str, nn.Parameter],
    batch: Batch,
    n_counted: int,
) -> None:
    """Add the gradients of the mean loss over the batch's tokens that count to the masters', for a few rows at a time."""
    device, n_tokens = model_device(model), batch["labels"].shape[1]
    # of each row; a collator may hand on other things, such as the texts
    batch = {
        key: value
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.shape[:1] == batch["labels"].shape[:1]
    }
    for rows in torch.arange(len(batch["labels"])).split(max(1, TOKENS_AT_ONCE // n_tokens)):
        part = {key: value[rows].to(device) for key, value in batch.items()}
        if not (predicted(model, part["labels"]) != IGNORED).any():
            continue
        loss = token_losses(model, part).sum() / n_counted
        for name, gradient in gradients_of(loss, parameters).items():
            master = masters[name]
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)


def _scored_weights(
    weights: AttentionWeights, attention: AttentionGeometry, tensors: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The slices of q, k and v of all heads of a layer, each of shape (H, D, hidden)."""
    slices = [head_slices(weights, attention, head, tensors) for head in range(attention.n_heads)]
    return [torch.stack([of_head[role].detach() for of_head in slices]) for role in SCORED_ROLES]


def weight_shift(before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
    """
    ALPS' distance of a head's weights before and after: the Wasserstein-1 distance between the two distributions
    `softmax(W_q W_k^T W_v)` over the entries of the product.

    With `W_q`, `W_k`, `W_v` of shape (hidden, D) the product has shape (hidden, D); taken from the right it needs only
    the D x D matrix `W_k^T W_v`, never one of hidden x hidden. As in ALPS' published code, entry `j` of the flattened
    product lies at `j / (n - 1)` on the unit interval, so the distance is the mean gap between the cumulative sums. Its
    K and V are those of the head's group, as the paper says (the published code takes the query head's index).

    Ours: where a query has more rows than its key, an output gate (Qwen3-Next) or a part whose key all heads share
    (latent attention), those come last and are left out, as there is no row of the key to pair them with.

    Args:
        before (`list[torch.Tensor]`): The heads' rows of the weights of q, k and v, each of shape (..., D, hidden).
        after (`list[torch.Tensor]`): The same after the run.

    Returns:
        `torch.Tensor`: shape (...), float64, on the CPU: the distances, at least 0, and 0 for equal weights.
    """

    def distribution(slices: list[torch.Tensor]) -> torch.Tensor:
        w_q, w_k, w_v = (where_float64_is(part).double() for part in slices)
        product = w_q[..., : w_k.shape[-2], :].mT @ (w_k @ w_v.mT)
        return torch.softmax(product.flatten(-2), dim=-1)

    gaps = torch.cumsum(distribution(after) - distribution(before), dim=-1).abs()
    return (gaps.sum(dim=-1) / max(gaps.shape[-1] - 1, 1)).cpu()
