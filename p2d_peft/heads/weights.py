"""What the localization methods share: the attention weights of a model, and sums over a head's slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..model_checks import FLOATS
from ..model_state import where_float64_is
from .geometry import ROLES, ROWS, AttentionGeometry, ModelGeometry, Role, Units, base_layer
from .head_set import Layer


# what a localization method returns: for each layer with heads its scores, shape (H,), float64
LayerScores: TypeAlias = dict[Layer, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ProjectionWeight:
    """
    The weight of one projection.

    Args:
        parameter (`nn.Parameter`): The weight as the model stores it.
        transposed (`bool`): Whether that is (in_features, out_features), as in GPT-2's Conv1D.
    """

    parameter: nn.Parameter
    transposed: bool

    def as_linear(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape, such as its gradient, as a view of shape (out_features, in_features)."""
        return values.T if self.transposed else values


# by the name of the projection; several roles may share one
AttentionWeights: TypeAlias = dict[str, ProjectionWeight]


def attention_weights(model: nn.Module, geometry: ModelGeometry, method: str) -> AttentionWeights:
    """
    The weights that hold the slices of the heads.

    Args:
        model (`nn.Module`): The model the geometry was read from.
        geometry (`ModelGeometry`): Its geometry.
        method (`str`): The localization method that asks, for the error message.

    Raises:
        `ValueError`: if a weight is quantized or on the meta device, where neither its values nor its gradients can be used, or is
            sharded over processes.
    """
    weights: AttentionWeights = {}
    for attention in geometry.values():
        for name in dict.fromkeys(attention.units(role).module for role in ROLES):
            layer = base_layer(model.get_submodule(name))
            weight = layer.weight
            if isinstance(weight, torch.Tensor) and is_sharded(weight):
                raise ValueError(
                    f"`method`='{method}' needs whole weights, but '{name}.weight' is sharded over processes (FSDP, DeepSpeed). "
                    "Localize before the model is sharded, as P2DTrainer does, or use a method that looks at no weights: 'gate' "
                    "or 'ablation' ('random' as the control)."
                )
            if not isinstance(weight, nn.Parameter) or weight.dtype not in FLOATS or weight.is_meta:
                raise ValueError(
                    f"`method`='{method}' needs floating-point weights, but '{name}.weight' is {weight.dtype} on "
                    f"{weight.device}. Localize on an unquantized copy of the model and pass the heads on, or use a "
                    "method that looks at no weights: 'gate' or 'ablation' ('random' as the control)."
                )
            weights[name] = ProjectionWeight(weight, isinstance(layer, Conv1D))
    return weights


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether a process has a part of a weight only, by FSDP2, by FSDP1 or by DeepSpeed's ZeRO-3."""
    # FSDP1 and ZeRO-3 leave nothing in its place between passes
    return hasattr(weight, "placements") or hasattr(weight, "ds_id") or not weight.numel()


def require_only(model: nn.Module, weights: AttentionWeights) -> None:
    """Put a model into eval mode, with gradients for the attention weights alone; `preserved_state` undoes it."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for weight in weights.values():
        weight.parameter.requires_grad = True


def head_slices(
    weights: AttentionWeights, attention: AttentionGeometry, head: int, tensors: Mapping[str, torch.Tensor]
) -> dict[Role, torch.Tensor]:
    """
    The slices of one head.

    Args:
        weights (`AttentionWeights`): The attention weights.
        attention (`AttentionGeometry`): The head's attention module.
        head (`int`): The head.
        tensors (`Mapping[str, torch.Tensor]`):
            By the name of the projection, tensors of its parameter's shape: the parameter itself, its gradient, a copy.

    Returns:
        `dict[str, torch.Tensor]`: for each role a view of the head's rows, or of its columns for `o`.
    """
    slices: dict[Role, torch.Tensor] = {}
    for role in ROLES:
        units, where = attention.units(role), attention.head_slice(role, head)
        tensor = weights[units.module].as_linear(tensors[units.module])
        slices[role] = tensor[where] if units.dim == ROWS else tensor[:, where]
    return slices


def unit_sums(values: torch.Tensor, units: Units) -> torch.Tensor:
    """
    Sum a tensor of a weight's shape over each unit of a role.

    Args:
        values (`torch.Tensor`): Shape (out_features, in_features).
        units (`Units`): The units.

    Returns:
        `torch.Tensor`: shape (number of units,), float64, on the values' device where that knows float64.
    """
    # (rows,) or (columns,): the other dim is summed in full
    lines = where_float64_is(values).sum(dim=1 - units.dim, dtype=torch.float64)
    return torch.stack([lines[start : start + units.size].sum() for start in units.starts])


def head_sums(attention: AttentionGeometry, sums: Mapping[Role, torch.Tensor]) -> torch.Tensor:
    """
    Add up the roles' sums head by head; a group's k and v count in full for each of its query heads.

    Args:
        attention (`AttentionGeometry`): One attention module.
        sums (`Mapping[str, torch.Tensor]`): For each role the sums over its units.

    Returns:
        `torch.Tensor`: shape (H,), float64.
    """
    groups = torch.tensor([attention.group(head) for head in range(attention.n_heads)], device=sums["k"].device)
    return sums["q"] + sums["o"] + sums["k"][groups] + sums["v"][groups]


def slice_sums(geometry: ModelGeometry, values: Mapping[str, torch.Tensor]) -> LayerScores:
    """
    Sum over the slices of q, k, v and o of each head; a group's k and v count in full for each of its query heads.

    Args:
        geometry (`ModelGeometry`): The heads.
        values (`Mapping[str, torch.Tensor]`):
            By the name of the projection, a tensor of shape (out_features, in_features).

    Returns:
        `LayerScores`: for each layer a float64 tensor of shape (H,) on the CPU.
    """
    sums: LayerScores = {}
    for layer, attention in geometry.items():
        parts = {role: unit_sums(values[attention.units(role).module], attention.units(role)) for role in ROLES}
        # a layer's projections may be on different devices
        sums[layer] = head_sums(attention, {role: part.cpu() for role, part in parts.items()})
    return sums
