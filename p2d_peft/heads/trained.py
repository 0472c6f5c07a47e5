"""The `trained` method: train one head after the other and see which training helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .geometry import ROLES, AttentionGeometry, ModelGeometry
from .lower_layers import LowerLayers
from .samples import Batch, nothing_counts, right_padded, rows_of, sample_losses
from .weights import AttentionWeights, LayerScores, attention_weights, head_slices, require_only


# Ours: enough steps for AdamW's second moments to matter, at a rate usual for so few trained weights.
STEPS = 5
LEARNING_RATE = 1e-3


def trained_scores(model: nn.Module, geometry: ModelGeometry, batches: Iterable[Batch], seed: int) -> LayerScores:
    """
    How far the loss on held-out samples falls when a head's slices of q, k, v and o, and nothing else, are trained: the
    gold standard that the other methods estimate, for small models. Ours.

    Of the samples that have a token that counts, in their order over all batches, the first, third, ... are trained on
    and the second, fourth, ... are held out. Each head starts from the model's weights, its group's k and v train along,
    and takes 5 steps of AdamW (learning rate 1e-3, no weight decay) on the mean loss of all samples to train on. The
    optimizer works on a float32 copy of the slices, so that a bf16 model moves, too. Afterwards the weights are put back
    bit for bit. A sample's loss is the mean over its tokens that count. Dropout is off.

    The cost for *each head*: 5 forward and backward passes over one half of the samples, and a forward pass over the other
    half, all of them through the layers from the head's one on: what the layers below put out is kept.

    Args:
        model (`nn.Module`): Causal language model or encoder-decoder with floating-point weights.
        geometry (`ModelGeometry`): Its heads.
        batches (`Iterable[Batch]`): The samples; their tokens are kept on the model's device.
        seed (`int`): Not used: nothing is random here.

    Returns:
        `LayerScores`: the mean held-out loss before minus after; of either sign.

    Raises:
        `ValueError`: if no sample, or only one, has a token that counts.
    """
    weights = attention_weights(model, geometry, "trained")
    require_only(model, {})
    train, held_out = _halves(batches, model)
    before = _mean_loss(model, held_out, nullcontext)
    scores: LayerScores = {}
    for layer, attention in geometry.items():
        names = dict.fromkeys(attention.units(role).module for role in ROLES)
        own = {name: weights[name].parameter for name in names}
        lower = LowerLayers(model, attention, held_out[0], own.values())
        originals = {name: parameter.detach().clone() for name, parameter in own.items()}
        gains = []
        for parameter in own.values():
            parameter.requires_grad = True
        for head in range(attention.n_heads):
            try:
                _train(model, weights, attention, head, own, train, lower)
                gains.append(before - _mean_loss(model, held_out, lower.kept))
            finally:
                with torch.no_grad():
                    for name, parameter in own.items():
                        parameter.copy_(originals[name])
        for parameter in own.values():
            parameter.requires_grad = False
        scores[layer] = torch.tensor(gains, dtype=torch.float64)
    return scores


def _halves(batches: Iterable[Batch], model: nn.Module) -> tuple[list[Batch], list[Batch]]:
    """The samples to train on and those held out, each in batches of half the given size."""
    halves: tuple[list[Batch], list[Batch]] = ([], [])
    seen = 0
    for batch in batches:
        rows = rows_of(batch, model)
        for parity, half in enumerate(halves):
            # whether a sample is held out depends on its place among all, not within its batch
            if chosen := rows[(parity + seen) % 2 :: 2]:
                half.append(right_padded(chosen))
        seen += len(rows)
    if not seen:
        raise nothing_counts()
    if seen == 1:
        raise ValueError(
            "`method`='trained' holds every other sample out, but `batches` holds one with a token that counts; give at "
            "least two, better about 100."
        )
    return halves


@torch.no_grad()
def _mean_loss(
    model: nn.Module, batches: list[Batch], in_context: Callable[[Batch], AbstractContextManager[Any]]
) -> float:
    losses = []
    for batch in batches:
        with in_context(batch):
            losses.append(sample_losses(model, batch).cpu().double())
    return float(torch.cat(losses).mean())


def _train(
    model: nn.Module,
    weights: AttentionWeights,
    attention: AttentionGeometry,
    head: int,
    own: dict[str, nn.Parameter],
    batches: list[Batch],
    lower: LowerLayers,
) -> None:
    """Train the slices of one head in place; `own` are the weights of its layer."""
    views = head_slices(weights, attention, head, {name: parameter.detach() for name, parameter in own.items()})
    masters = {role: nn.Parameter(view.to(torch.float32, copy=True)) for role, view in views.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    n_samples = sum(len(batch["input_ids"]) for batch in batches)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for batch in batches:
            with lower.kept(batch):
                loss = sample_losses(model, batch).sum() / n_samples
            gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
            for role, gradient in head_slices(weights, attention, head, gradients).items():
                master = masters[role]
                master.grad = gradient.float() if master.grad is None else master.grad + gradient.float()
        optimizer.step()
        with torch.no_grad():
            for role, view in views.items():
                view.copy_(masters[role])
