"""
The layer of HeadSparse: a frozen linear layer and, for each adapter, a trained delta on a few of its rows or columns.

Legend of tensor shapes: B batch, T tokens (any leading dimensions will do), I input features, O output features,
N rows or columns of the slice.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn

from ...heads.geometry import ROWS
from .config import HeadSparseConfig


@dataclass(frozen=True)
class WeightSlice:
    """
    Some rows or columns of a weight of shape (out_features, in_features).

    Args:
        dim (`int`): 0 for rows (outputs), 1 for columns (inputs).
        indices (`tuple[int, ...]`): The rows or columns in ascending order.
    """

    dim: int
    indices: tuple[int, ...]

    def shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """The shape of the slice: (N, in_features) for rows, (out_features, N) for columns."""
        return (len(self.indices), in_features) if self.dim == ROWS else (out_features, len(self.indices))


class HeadSparseLayer(BaseTunerLayer):
    """
    What every layer of HeadSparse has: the deltas, where they belong, and merging.

    Attributes:
        head_sparse_delta (`nn.ParameterDict`):
            For each adapter its delta, of shape (N, in_features) for rows or (out_features, N) for columns.
        head_sparse_slice (`dict[str, WeightSlice]`):
            For each adapter the rows or columns that its delta is added to.
        head_sparse_index (`dict[str, torch.Tensor]`):
            The same as an int64 tensor of shape (N,), on the device where it was needed last. Not a buffer: it follows
            from the config and the model, so it is never saved; a buffer would lose its values on the meta device
            (`to_empty` leaves garbage behind), and DDP would send it around in each step.
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names = ("head_sparse_delta",)
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("head_sparse_slice", "head_sparse_index")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.head_sparse_delta = nn.ParameterDict({})
        self.head_sparse_slice: dict[str, WeightSlice] = {}
        self.head_sparse_index: dict[str, torch.Tensor] = {}
        # for each merged adapter: where it was merged into, and what was there before
        self._replaced: dict[str, tuple[tuple[Any, ...], torch.Tensor]] = {}
        self.merged_adapters: list[str] = []
        # turned off by `peft.helpers.disable_input_dtype_casting`
        self.cast_input_dtype_enabled = True

        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"Unsupported layer type {type(self.get_base_layer()).__name__}")
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter_name: str, weight_slice: WeightSlice, config: HeadSparseConfig) -> None:
        """
        Create the delta of an adapter.

        Args:
            adapter_name (`str`): The adapter's name.
            weight_slice (`WeightSlice`): The rows or columns to train.
            config (`HeadSparseConfig`): The adapter's configuration.
        """
        # PEFT's convention: adapters start in the base's dtype, `autocast_adapter_dtype` then lifts them to fp32
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is not None and not dtype.is_floating_point:
            dtype = None  # a quantized weight
        delta = torch.zeros(weight_slice.shape(self.in_features, self.out_features), device=device, dtype=dtype)
        if not config.init_weights:
            nn.init.normal_(delta, std=0.02)
        self.head_sparse_slice[adapter_name] = weight_slice
        self.head_sparse_index[adapter_name] = torch.tensor(weight_slice.indices, device="cpu")
        self.head_sparse_delta[adapter_name] = nn.Parameter(delta)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_delta(self, result_BTO: torch.Tensor, x_BTI: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Add the share of an adapter to the base layer's output, in the dtype of that output."""
        delta = self.head_sparse_delta[adapter_name]
        index_N = self._index(adapter_name, x_BTI.device)
        on_rows = self.head_sparse_slice[adapter_name].dim == ROWS

        x = x_BTI if on_rows else x_BTI.index_select(-1, index_N)
        y = nn.functional.linear(self._cast_input_dtype(x, delta.dtype), delta).to(result_BTO.dtype)
        # Subtracting 0 - y, and not adding y: r + 0.0 makes -0.0 to 0.0, while r - 0.0 is r in each bit, and 0 - y is
        # +0.0 for a zero of either sign. Never in place: hooks of the base layer may hold on to its output.
        minus_y = 0.0 - y
        return result_BTO.index_add(-1, index_N, minus_y, alpha=-1) if on_rows else result_BTO - minus_y

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta of an adapter as a dense tensor of shape (out_features, in_features), in the delta's dtype."""
        delta = self.head_sparse_delta[adapter_name]
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense[self._where(adapter_name, delta.device)] = delta
        return dense

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """
        Merge adapters into a copy of the base weight, to see that nothing in it is NaN or infinite.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters; all active ones by default.

        Raises:
            `ValueError`: if there are such values; the message names the adapter.
        """
        weight = self.get_base_weight().clone()
        for adapter_name in self._names_here(adapter_names):
            if adapter_name not in self.merged_adapters:
                self._merge_into(weight, adapter_name)
                if not torch.isfinite(weight).all():
                    raise ValueError(
                        f"NaNs or infinities detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the deltas of adapters to the base weight, and keep what was there before.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Try it on a copy first and look for NaNs.
            adapter_names (`list[str]`, *optional*): The adapters; all active ones by default.

        Raises:
            `ValueError`: if `safe_merge` finds NaN or an infinity. The base weight is untouched then.
            `TypeError`: if the base weight is quantized.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if safe_merge:
            self.check_merge(adapter_names)
        for adapter_name in self._names_here(adapter_names):
            self._replaced[adapter_name] = self._merge_into(self.get_base_weight(), adapter_name)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Put back what was in the base weight before the merged adapters, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # the last one first: adapters may overlap
        while self.merged_adapters:
            where, replaced = self._replaced.pop(self.merged_adapters.pop())
            weight = self.get_base_weight()
            weight[where] = replaced.to(weight)

    def _merge_into(self, weight_OI: torch.Tensor, adapter_name: str) -> tuple[tuple[Any, ...], torch.Tensor]:
        """Add a delta to a weight in place; returns where, and what was there before."""
        if not weight_OI.is_floating_point():
            raise TypeError(
                f"Merging into a {type(self.get_base_layer()).__name__} with weights of {weight_OI.dtype} is not supported."
            )
        delta = self.head_sparse_delta[adapter_name].detach()
        where = self._where(adapter_name, weight_OI.device)
        replaced = weight_OI[where].clone()
        # added in the wider of the two dtypes and rounded once
        weight_OI[where] = (replaced + delta).to(weight_OI.dtype)
        return where, replaced

    def _names_here(self, adapter_names: list[str] | None = None) -> list[str]:
        """Those of the adapters, all active ones by default, that have a delta in this layer."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.head_sparse_delta]

    def _where(self, adapter_name: str, device: torch.device) -> tuple[Any, ...]:
        """The slice as an index into a weight on a device."""
        index_N = self._index(adapter_name, device)
        return (index_N,) if self.head_sparse_slice[adapter_name].dim == ROWS else (slice(None), index_N)

    def _index(self, adapter_name: str, device: torch.device) -> torch.Tensor:
        """The rows or columns of an adapter as a tensor on a device."""
        index_N = self.head_sparse_index[adapter_name]
        if index_N.device == device:
            return index_N
        moved_N = index_N.to(device)
        if device.type != "meta":  # a tensor on the meta device holds no values to come back to
            self.head_sparse_index[adapter_name] = moved_N
        return moved_N

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after it loaded an adapter with `low_cpu_mem_usage`. Its own version also casts to the base's
        # dtype, which would round trained fp32 deltas to bf16, and makes them trainable.
        if adapter_name not in self.head_sparse_delta:
            return
        delta = self.head_sparse_delta[adapter_name]
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if not delta.is_meta:
            self.head_sparse_delta[adapter_name] = nn.Parameter(delta.to(device), requires_grad=delta.requires_grad)


class Linear(nn.Module, HeadSparseLayer):
    """
    HeadSparse on a linear layer.

    The output is that of the base layer's own forward pass, whose hooks keep working, plus the delta's share: a small
    product on the chosen outputs (rows), or of the chosen inputs (columns). A delta of zero leaves the base layer's
    output as it is, bit for bit.

    Args:
        base_layer (`nn.Module`): The linear layer, or another adapter's layer around it.
        adapter_name (`str`): The first adapter's name.
        weight_slice (`WeightSlice`): The rows or columns to train.
        config (`HeadSparseConfig`): The adapter's configuration.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, weight_slice: WeightSlice, config: HeadSparseConfig
    ) -> None:
        super().__init__()
        HeadSparseLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, weight_slice, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): Input of shape (..., in_features); further arguments go to the base layer.

        Returns:
            `torch.Tensor`: Output of shape (..., out_features), in the dtype of the base layer's output.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter_name in self._names_here():
            result = self._add_delta(result, x, adapter_name)
        return result

    def __repr__(self) -> str:
        return "head_sparse." + super().__repr__()
