"""
What every layer of HeadSparse has: for each adapter a trained delta on a few rows or columns of a frozen weight, and how
it goes into that weight and out again.

Legend of tensor shapes: B batch, T tokens (any leading dimensions will do), I input features, O output features,
N rows or columns of the slice, R rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...heads.geometry import ROWS
from ...model_checks import FLOATS
from .config import HeadSparseConfig
from .delta import Delta, DeltaDict


@dataclass(frozen=True)
class WeightSlice:
    """
    Some rows or columns of a linear map's weight of shape (out_features, in_features).

    Args:
        dim (`int`): 0 for rows (outputs), 1 for columns (inputs).
        indices (`tuple[int, ...]`): The rows or columns in ascending order.
    """

    dim: int
    indices: tuple[int, ...]

    def shape(self, in_features: int, out_features: int) -> tuple[int, int]:
        """The shape of the slice: (N, in_features) for rows, (out_features, N) for columns."""
        return (len(self.indices), in_features) if self.dim == ROWS else (out_features, len(self.indices))


class _AddOnRows(torch.autograd.Function):
    """
    Adds y of shape (..., N) to some of the last dim's entries. As `index_add` does it, but that one keeps y for the
    backward pass, which has no use for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(result_BTO: torch.Tensor, index_N: torch.Tensor, y_BTN: torch.Tensor) -> torch.Tensor:
        return result_BTO.index_add(-1, index_N, 0.0 - y_BTN, alpha=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_BTO: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (index_N,) = ctx.saved_tensors
        return grad_BTO, None, grad_BTO.index_select(-1, index_N)


class HeadSparseLayer(BaseTunerLayer):
    """
    What every layer of HeadSparse has: the deltas, where they belong, and merging.

    An adapter has either `head_sparse_delta` or, if its config has an `r`, `head_sparse_A` and `head_sparse_B`.

    Attributes:
        head_sparse_delta ([`DeltaDict`]):
            For each adapter its delta, of shape (N, in_features) for rows or (out_features, N) for columns.
        head_sparse_A, head_sparse_B ([`DeltaDict`]):
            For each adapter the factors of its delta, `B @ A`: of shape (R, in_features) and (N, R) for rows, or
            (R, N) and (out_features, R) for columns.
        head_sparse_slice (`dict[str, WeightSlice]`):
            For each adapter the rows or columns that its delta is added to.
        head_sparse_index (`dict[str, torch.Tensor]`):
            The same as an int64 tensor of shape (N,), on the device where it was needed last. Not a buffer: it follows
            from the config and the model, so it is never saved; a buffer would lose its values on the meta device
            (`to_empty` leaves garbage behind), and DDP would send it around in each step.
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names = ("head_sparse_delta", "head_sparse_A", "head_sparse_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names = ("head_sparse_slice", "head_sparse_index")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.head_sparse_delta = DeltaDict()
        self.head_sparse_A = DeltaDict()
        self.head_sparse_B = DeltaDict()
        self.head_sparse_slice: dict[str, WeightSlice] = {}
        self.head_sparse_index: dict[str, torch.Tensor] = {}
        # for each merged adapter: what was in its slice before
        self._replaced: dict[str, torch.Tensor] = {}
        self.merged_adapters: list[str] = []
        # `peft.helpers.disable_input_dtype_casting` asks each layer for it; here no input is ever cast
        self.cast_input_dtype_enabled = True

        # a Conv1D keeps the weight of its linear map transposed
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
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
        if device is not None and device.type == "meta":
            # Accelerate offloaded the base's weight, and brings it to this device for each forward pass; the deltas stay
            # there. On the meta device they would have no values.
            device = getattr(getattr(self.get_base_layer(), "_hf_hook", None), "execution_device", device)
        if dtype not in FLOATS:
            dtype = None  # a quantized weight
        rows, columns = weight_slice.shape(self.in_features, self.out_features)
        self.head_sparse_slice[adapter_name] = weight_slice
        # where the inputs will be, as far as that is known: a copy in the first pass could not be captured in a CUDA graph
        index_device = "cpu" if device is None or torch.device(device).type == "meta" else device
        self.head_sparse_index[adapter_name] = torch.tensor(weight_slice.indices, device=index_device)
        if config.r is None:
            delta = torch.zeros(rows, columns, device=device, dtype=dtype)
            if not config.init_weights:
                nn.init.normal_(delta, std=0.02)
            self.head_sparse_delta[adapter_name] = Delta(delta)
        else:
            A = torch.empty(config.r, columns, device=device, dtype=dtype)
            B = torch.zeros(rows, config.r, device=device, dtype=dtype)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if not config.init_weights:
                nn.init.normal_(B, std=0.02)
            self.head_sparse_A[adapter_name] = Delta(A)
            self.head_sparse_B[adapter_name] = Delta(B)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_delta(self, result_BTO: torch.Tensor, x_BTI: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Add the share of an adapter to the base layer's output, in the dtype of that output."""
        index_N = self._index(adapter_name, x_BTI.device)
        on_rows = self.head_sparse_slice[adapter_name].dim == ROWS
        x = x_BTI if on_rows else x_BTI.index_select(-1, index_N)
        if adapter_name in self.head_sparse_delta:
            y = self.head_sparse_delta[adapter_name](x)
        else:
            y = self.head_sparse_B[adapter_name](self.head_sparse_A[adapter_name](x))
        y = y.to(result_BTO.dtype)
        # Subtracting 0 - y, and not adding y: r + 0.0 makes -0.0 to 0.0, while r - 0.0 is r in each bit, and 0 - y is
        # +0.0 for a zero of either sign. Never in place: hooks of the base layer may hold on to its output.
        if not on_rows:
            return result_BTO - (0.0 - y)
        # without a backward pass no node for it either, which `torch.jit.trace` could not save
        add = _AddOnRows.apply if torch.is_grad_enabled() else _AddOnRows.forward
        return add(result_BTO, index_N, y)

    def get_slice_delta(self, adapter_name: str) -> torch.Tensor:
        """The delta of an adapter on its slice, of shape (N, in_features) for rows or (out_features, N) for columns."""
        if adapter_name in self.head_sparse_delta:
            return self.head_sparse_delta[adapter_name].weight
        A, B = self.head_sparse_A[adapter_name].weight, self.head_sparse_B[adapter_name].weight
        # at least in fp32: the product is rounded once, where it is merged
        dtype = torch.promote_types(A.dtype, torch.float32)
        return B.to(dtype) @ A.to(dtype)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta of an adapter as a dense tensor of the shape of the base weight, zero outside of the slice."""
        delta = self.get_slice_delta(adapter_name)
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense[self._where(adapter_name, delta.device)] = delta
        return dense.T if self.fan_in_fan_out else dense

    def get_base_weight(self) -> torch.Tensor:
        if self.quantization_backend is not None:
            # In a forward pass for inference on the CPU, bitsandbytes reorders 4-bit weights in a way that PEFT's backend
            # would misread. It puts the order back to save them.
            self.get_base_layer().state_dict()
        weight: torch.Tensor = super().get_base_weight()
        return weight

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """
        Merge adapters into a copy of the base weight, to see that nothing in it is NaN or infinite.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters; all active ones by default.

        Raises:
            `ValueError`: if there are such values; the message names the adapter.
        """
        weight_OI = self._as_linear(self.get_base_weight()).clone()
        for adapter_name in self._names_here(adapter_names):
            if adapter_name not in self.merged_adapters:
                self._merge_into(weight_OI, adapter_name)
                if not torch.isfinite(weight_OI).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the deltas of adapters to the base weight, and keep what was there before.

        A weight that is quantized is dequantized for it and quantized again, if its backend can.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Try it on a copy first and look for NaNs.
            adapter_names (`list[str]`, *optional*): The adapters; all active ones by default.

        Raises:
            `ValueError`: if `safe_merge` finds NaN or an infinity. The base weight is untouched then.
            `TypeError`: if the base weight is quantized in a way that PEFT cannot merge into.
        """
        names = self._names_here(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        weight = self.get_base_weight()
        for adapter_name in names:
            self._replaced[adapter_name] = self._merge_into(self._as_linear(weight), adapter_name)
            self.merged_adapters.append(adapter_name)
        self._store(weight)

    def unmerge(self) -> None:
        """
        Put back what was in the base weight before the merged adapters, bit for bit. (A quantized weight comes back as
        close as quantizing it again can do.)
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_weight()
        # the last one first: adapters may overlap
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            replaced = self._replaced.pop(adapter_name)
            self._as_linear(weight)[self._where(adapter_name, weight.device)] = replaced.to(weight)
        self._store(weight)

    def _merge_into(self, weight_OI: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Add a delta to a weight in place; returns what was in its slice before."""
        if weight_OI.dtype not in FLOATS:
            raise TypeError(
                f"Merging into a {type(self.get_base_layer()).__name__} with weights of {weight_OI.dtype} is not supported."
            )
        delta = self.get_slice_delta(adapter_name).detach()
        where = self._where(adapter_name, weight_OI.device)
        replaced = weight_OI[where].clone()
        # added in the wider of the two dtypes and rounded once
        weight_OI[where] = (replaced + delta.to(weight_OI.device)).to(weight_OI.dtype)
        return replaced

    def _store(self, weight: torch.Tensor) -> None:
        """Keep a changed base weight. One that is not quantized was changed in place, and stays tied to its others."""
        if self.quantization_backend is not None:
            self.set_base_weight(weight)

    def _as_linear(self, weight: torch.Tensor) -> torch.Tensor:
        """The base layer's weight as a view of shape (out_features, in_features)."""
        return weight.T if self.fan_in_fan_out else weight

    def _names_here(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """Those of the adapters, all active ones by default, that have a delta in this layer."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.head_sparse_slice]

    def _where(self, adapter_name: str, device: torch.device) -> tuple[Any, ...]:
        """The slice as an index into a linear map's weight on a device."""
        index_N = self._index(adapter_name, device)
        return (index_N,) if self.head_sparse_slice[adapter_name].dim == ROWS else (slice(None), index_N)

    def _index(self, adapter_name: str, device: torch.device) -> torch.Tensor:
        """The rows or columns of an adapter as a tensor on a device."""
        index_N = self.head_sparse_index[adapter_name]
        if index_N.device == device:
            return index_N
        # In a pass in inference mode, too, no inference tensor: a later pass could not keep that for its backward pass.
        with torch.inference_mode(False):
            moved_N = index_N.to(device)
        if device.type != "meta":  # a tensor on the meta device holds no values to come back to
            self.head_sparse_index[adapter_name] = moved_N
        return moved_N

    def deltas_of(self, adapter_name: str) -> list[Delta]:
        """The modules with the parameters of an adapter: its delta, or its two factors."""
        modules = [getattr(self, name) for name in self.adapter_layer_names]
        return [module[adapter_name] for module in modules if adapter_name in module]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this after it loaded an adapter with `low_cpu_mem_usage`. Its own version also casts to the base's
        # dtype, which would round trained fp32 deltas to bf16.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for delta in self.deltas_of(adapter_name):
            if not delta.weight.is_meta:
                delta.to(device)
