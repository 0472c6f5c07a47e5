"""What the localization methods share: batches, the attention weights of a model, and sums over a head's slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..model_state import model_device
from .geometry import ROLES, AttentionGeometry, ModelGeometry, Role, Units, base_layer


# What a causal language model takes as keyword arguments: input_ids, attention_mask and labels of shape (B, T), int64;
# labels are -100 on tokens that do not count.
Batch: TypeAlias = Mapping[str, torch.Tensor]


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
        `ValueError`: if a weight is quantized or on the meta device: its gradients do not exist.
    """
    weights: AttentionWeights = {}
    for attention in geometry.values():
        for name in dict.fromkeys(attention.units(role).module for role in ROLES):
            layer = base_layer(model.get_submodule(name))
            weight = layer.weight
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.is_meta:
                raise ValueError(
                    f"`method`='{method}' needs the gradients of floating-point weights, but '{name}.weight' is "
                    f"{weight.dtype} on {weight.device}. Localize on an unquantized copy of the model and pass the "
                    "heads on, or use `method`='random'."
                )
            weights[name] = ProjectionWeight(weight, isinstance(layer, Conv1D))
    return weights


def require_only(model: nn.Module, weights: AttentionWeights) -> None:
    """Put a model into eval mode, with gradients for the attention weights alone; `preserved_state` undoes it."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for weight in weights.values():
        weight.parameter.requires_grad = True


def nothing_counts() -> ValueError:
    """The error for batches without a single token to learn from."""
    return ValueError("`batches` holds no sample with a token that counts (a label other than -100).")


def unit_sums(values: torch.Tensor, units: Units) -> torch.Tensor:
    """
    Sum a tensor of a weight's shape over each unit of a role.

    Args:
        values (`torch.Tensor`): Shape (out_features, in_features).
        units (`Units`): The units.

    Returns:
        `torch.Tensor`: shape (number of units,), float64.
    """
    # (rows,) or (columns,): the other dim is summed in full
    lines = values.sum(dim=1 - units.dim, dtype=torch.float64)
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


def single_rows(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """
    The rows of all batches as batches of one, without their padding, on the model's device.

    Rows without a token that counts are left out: they have no loss.
    """
    device = model_device(model)
    for batch in batches:
        for row in range(batch["input_ids"].shape[0]):
            kept = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            single = {key: batch[key][row][kept][None].to(device) for key in ("input_ids", "labels")}
            if (single["labels"][:, 1:] != -100).any():
                yield {**single, "attention_mask": torch.ones_like(single["input_ids"])}
