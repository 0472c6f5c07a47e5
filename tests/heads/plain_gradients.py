"""Gradients of a head's slices the plain way: loss.backward() and explicit index arithmetic in place of the geometry."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def slices(model: PreTrainedModel, layer: int, head: int) -> list[tuple[torch.nn.Parameter, tuple[slice, ...]]]:
    """The weights of q, k, v and o in a model like Llama, or GPT-2, and which part of them is a head's."""
    config = model.config
    if config.model_type == "gpt2":
        size, width = config.n_embd // config.n_head, config.n_embd
        attention = model.transformer.h[layer].attn
        own = slice(head * size, (head + 1) * size)
        fused = [slice(block * width + own.start, block * width + own.stop) for block in range(3)]
        weights = [(attention.c_attn.weight, (slice(None), part)) for part in fused]
        return [*weights, (attention.c_proj.weight, (own, slice(None)))]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    own, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
    attention = model.model.layers[layer].self_attn
    return [
        (attention.q_proj.weight, (own, slice(None))),
        (attention.k_proj.weight, (shared, slice(None))),
        (attention.v_proj.weight, (shared, slice(None))),
        (attention.o_proj.weight, (slice(None), own)),
    ]


def heads_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    config = model.config
    return [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]


def gradients_by_head(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """For each head the gradients of all weights of its slices, sample by sample: float64 of shape (samples, weights)."""
    samples: dict[tuple[int, int], list[torch.Tensor]] = {head: [] for head in heads_of(model)}
    for row in range(len(batch["input_ids"])):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for head, rows in samples.items():
            rows.append(torch.cat([weight.grad[part].flatten().double() for weight, part in slices(model, *head)]))
    model.zero_grad()
    return {head: torch.stack(rows) for head, rows in samples.items()}


def table(model: PreTrainedModel, scores: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    return torch.stack([scores[head] for head in heads_of(model)]).view(model.config.num_hidden_layers, -1)


def mean_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """The mean over samples of the mean over their counted tokens, in the precision of the logits."""
    losses = []
    for row in range(len(batch["input_ids"])):
        with torch.no_grad():
            logits = model(**{key: value[row : row + 1] for key, value in batch.items() if key != "labels"}).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][row, 1:]))
    return float(torch.stack(losses).mean())
