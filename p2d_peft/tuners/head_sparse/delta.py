"""
Adapters' parameters in a layer, as modules.

Legend of tensor shapes: B batch, T tokens (any leading dimensions will do), I input features, O output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


class Delta(nn.Module):
    """
    A parameter of shape (O, I), and a forward pass that multiplies by it.

    A module, and its parameter a `weight`, as in LoRA. Others count on it: TRL's trainers for preferences copy a trained
    adapter into the reference by its parameters' names, where `.default.` has to be followed by something; and
    `peft.utils.other.fsdp_auto_wrap_policy` wraps a module by itself if its `weight` is trained, where FSDP would
    otherwise flatten it together with frozen weights, and gathers its shards just before its forward pass.

    Args:
        weight (`torch.Tensor`): What it starts from.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """
        `x_BTI` times the transposed parameter, of shape (B, T, O), in the dtype of `x_BTI`.

        PEFT keeps adapters of a half-precision model in float32. Other methods lift the input to that; here the product
        is as large as a projection's, and a GPU takes many times as long for it in float32. So the parameter is rounded
        to the input's dtype, as autocast would do it, and its gradient and its updates stay in float32.
        """
        return nn.functional.linear(x_BTI, self.weight.to(x_BTI.dtype))


class DeltaDict(nn.ModuleDict):
    """For each adapter its [`Delta`]."""

    if TYPE_CHECKING:  # that of a `ModuleDict` may be any module

        def __getitem__(self, key: str) -> Delta: ...
