"""The weighted sum of adapters as one adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...heads.geometry import ROLES, ModelGeometry
from ...heads.head_set import HeadSet
from .config import HeadSparseConfig
from .layer import HeadSparseLayer


def combined_config(
    configs: Mapping[str, HeadSparseConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    geometry: ModelGeometry,
) -> HeadSparseConfig:
    """
    The configuration of an adapter that has all slices of others.

    Raises:
        `ValueError`: see [`HeadSparseModel.add_weighted_adapter`].
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"`weights` must have one number for each of `adapters`, got {len(weights)} for {len(adapters)} adapters."
        )
    for name in adapters:
        if name not in configs:
            raise ValueError(f"`adapters` has '{name}', which does not exist; there are: {', '.join(configs)}.")
        if configs[name].modules_to_save or configs[name].trainable_token_indices or configs[name].bias != "none":
            raise ValueError(
                f"Adapter '{name}' trains more than heads (`modules_to_save`, `trainable_token_indices` or `bias`), "
                "which cannot be combined."
            )
    chosen = [configs[name] for name in adapters]
    for field in ("target_modules", "exclude_modules"):
        if any(getattr(config, field) != getattr(chosen[0], field) for config in chosen):
            raise ValueError(f"`adapters` ({', '.join(adapters)}) differ in `{field}`, which cannot be combined.")
    heads = HeadSet(
        {head for config in chosen for head in config.head_set(geometry) if config.transforms(geometry[head.layer])}
    )
    return replace(
        chosen[0],
        heads=heads,
        projections=[role for role in ROLES if any(role in config.roles() for config in chosen)],
        share_kv=any(config.share_kv for config in chosen),
        r=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_weights=True,  # zero where none of them has a delta
    )


def combined_delta(
    layer: HeadSparseLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> torch.Tensor:
    """The weighted sum of adapters in one layer, of the shape of the slice of `adapter_name`, which has all of theirs."""
    weight_slice = layer.head_sparse_slice[adapter_name]
    position = {index: place for place, index in enumerate(weight_slice.indices)}
    parts = {name: layer.get_slice_delta(name) for name in adapters if name in layer.head_sparse_slice}
    # in the widest of their dtypes, so that none is rounded
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts.values()))
    total = torch.zeros_like(layer.head_sparse_delta[adapter_name].weight, dtype=dtype)
    for name, weight in zip(adapters, weights, strict=True):
        if name in parts:
            places = [position[index] for index in layer.head_sparse_slice[name].indices]
            part = weight * parts[name].to(total)
            total.index_add_(weight_slice.dim, torch.tensor(places, device=total.device), part)
    return total
