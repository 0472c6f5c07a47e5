"""
HeadSparse on a linear layer: the base layer's own forward pass and the few rows or columns of the deltas.

Legend of tensor shapes: B batch, T tokens (any leading dimensions will do), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils import quantization_extra_repr
from torch import nn

from .config import HeadSparseConfig
from .layer import HeadSparseLayer, WeightSlice


class Linear(nn.Module, HeadSparseLayer):
    """
    HeadSparse on a linear layer: `nn.Linear`, transformers' `Conv1D`, or a quantized one.

    The output is that of the base layer's own forward pass, whose hooks keep working, plus the delta's share: a small
    product on the chosen outputs (rows), or of the chosen inputs (columns). A delta of zero leaves the base layer's
    output as it is, bit for bit.

    Args:
        base_layer (`nn.Module`): The linear layer, or another adapter's layer around it.
        adapter_name (`str`): The first adapter's name.
        weight_slice (`WeightSlice`): The rows or columns to train.
        config (`HeadSparseConfig`): The adapter's configuration.
        kwargs: What PEFT's quantization backends need, see `peft.utils.get_quantization_kwargs`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        weight_slice: WeightSlice,
        config: HeadSparseConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        HeadSparseLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, weight_slice, config)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): Input of shape (..., in_features); further arguments go to the base layer.
            adapter_names (`Sequence[str]`, *optional*):
                For each row of the batch the adapter to use, `"__base__"` for none, instead of the active ones.

        Returns:
            `torch.Tensor`: Output of shape (..., out_features), in the dtype of the base layer's output.

        Raises:
            `ValueError`: if there are not as many `adapter_names` as rows, or if an adapter is merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(result, x, adapter_names)
        if self.disable_adapters or self.merged:
            return result
        for adapter_name in self._names_here():
            result = self._add_delta(result, x, adapter_name)
        return result

    def _mixed_batch(
        self, result_BTO: torch.Tensor, x_BTI: torch.Tensor, adapter_names: Sequence[str]
    ) -> torch.Tensor:
        """Add to each row of the batch the share of its own adapter."""
        if len(x_BTI) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x_BTI)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = result_BTO.clone()
        for adapter_name in self._names_here(sorted(set(adapter_names))):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
            result[rows] = self._add_delta(result_BTO[rows], x_BTI[rows], adapter_name)
        return result

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "head_sparse." + super().__repr__()
