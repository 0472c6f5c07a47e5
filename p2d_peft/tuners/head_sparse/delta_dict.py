"""
The dictionary of the adapters' parameters in a layer, as a module that uses them itself.

Legend of tensor shapes: B batch, T tokens (any leading dimensions will do), I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import nn


class DeltaDict(nn.ParameterDict):
    """
    For each adapter a parameter of shape (O, I), and a forward pass that multiplies by it.

    FSDP gathers the shards of a module that it wraps just before that module's forward pass. A plain
    `nn.ParameterDict` has none, so that it could not be wrapped. The names in a state dict are those of the plain one.
    """

    # the base class refuses calls
    __call__ = nn.Module.__call__

    def forward(self, x_BTI: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """
        `x_BTI` times the transposed parameter of an adapter, of shape (B, T, O), in the dtype of `x_BTI`.

        PEFT keeps adapters of a half-precision model in float32. Other methods lift the input to that; here the product
        is as large as a projection's, and a GPU takes many times as long for it in float32. So the parameter is rounded
        to the input's dtype, as autocast would do it, and its gradient and its updates stay in float32.
        """
        return nn.functional.linear(x_BTI, self[adapter_name].to(x_BTI.dtype))

    def has(self, adapter_name: str) -> bool:
        """Whether there is a parameter of an adapter. FSDP's wrapper hands on methods, but not `in`."""
        return adapter_name in self

    @property
    def weight(self) -> nn.Parameter | None:
        """
        A parameter that is trained, if there is one: `peft.utils.other.fsdp_auto_wrap_policy` wraps a module by itself
        if its `weight` is trained. Otherwise FSDP would flatten it together with frozen weights.
        """
        return next((parameter for parameter in self.values() if parameter.requires_grad), None)
