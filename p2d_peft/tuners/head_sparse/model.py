"""The tuner of HeadSparse: finds the slices of the chosen heads in a model and wraps the projections that hold them."""

from __future__ import annotations

import copy
import re

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists, onload_layer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ...heads.geometry import ROLES, ROWS, AttentionGeometry, ModelGeometry, Role
from .config import HeadSparseConfig
from .layer import HeadSparseLayer, Linear, WeightSlice


class HeadSparseModel(BaseTuner):
    """
    Trains chosen attention heads of a frozen model: the third step of *From Parameters to Data* (P2D,
    https://huggingface.co/papers/2605.21558, section 3.2.3).

    Each chosen head's slices of the attention projections get a delta, zero at the start: its rows of the query
    projection, its group's rows of the key and value projections, its columns of the output projection. That the key
    and value slices of a group are trained with each of its heads follows the sharing in ALPS
    (https://huggingface.co/papers/2505.18799).

    Args:
        model (`nn.Module`): The model to adapt.
        config ([`HeadSparseConfig`]): The configuration.
        adapter_name (`str`): The adapter's name, `"default"` where `get_peft_model` chooses it.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the deltas on the meta device, which makes loading faster.

    Raises:
        `ValueError`: if the model's attention is of a layout that is not covered, if it lacks a chosen head, or if
            `target_modules` and `exclude_modules` leave nothing to train. The model is untouched then.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForCausalLM

    >>> from p2d_peft import HeadSet, HeadSparseConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, HeadSparseConfig(heads=HeadSet([(3, 0), (3, 7), (11, 2)])))
    >>> model.print_trainable_parameters()
    ```
    """

    prefix: str = "head_sparse_"
    tuner_layer_cls = HeadSparseLayer

    # the parts that live in each projection, by its full name: more than one role where they share a projection
    _parts: dict[str, list[tuple[AttentionGeometry, Role]]]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        try:
            self._check_injection(self.peft_config[adapter_name], state_dict or {})
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            # for a second adapter this dictionary is the model's own, which then must not list what it does not have
            self.peft_config.pop(adapter_name, None)
            raise

    def _check_injection(self, config: HeadSparseConfig, state_dict: dict[str, torch.Tensor]) -> None:
        """Read the model's geometry and check the config against it, before anything in the model is touched."""
        geometry = ModelGeometry.of(self.model)
        config.set_heads(config.heads)  # someone may have assigned the attribute
        config.head_set(geometry)  # raises if the model lacks one of them
        self._parts = {}
        for attention in geometry.values():
            for role in ROLES:
                self._parts.setdefault(attention.units(role).module, []).append((attention, role))
        if not any(self._check_target_module_exists(config, name) for name in self._parts):
            holding = [name for name in self._parts if self._weight_slice(config, name) is not None]
            raise NoMatchingPeftModuleError(
                f"`target_modules` ({config.target_modules}), `exclude_modules` ({config.exclude_modules}) and "
                f"`modules_to_save` ({config.modules_to_save}) leave nothing to train of the projections that hold the "
                f"chosen heads: '{holding[0]}' to '{holding[-1]}' ({len(holding)} in all)."
            )
        for key in state_dict:
            name, is_delta, _ = key.removeprefix("_orig_mod.").rpartition(f".{self.prefix}")
            if is_delta and self._weight_slice(config, name) is None:
                raise ValueError(f"`state_dict` has a delta for '{name}', which holds none of the config's heads.")

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # `target_modules` stays as it was given, where other methods fill it in: the heads say it all, also for a
        # model of another depth or whose modules have other names.
        return peft_config

    def _weight_slice(self, config: HeadSparseConfig, key: str) -> WeightSlice | None:
        """The rows or columns that the config's heads own in the projection named `key`; `None` if there are none."""
        dim = ROWS
        indices: set[int] = set()
        for attention, role in self._parts.get(key, ()):
            units = attention.units(role)
            dim = units.dim  # the same for all parts of a projection
            for unit in attention.units_of(role, config.heads_in(attention.layer, attention.n_heads)):
                indices.update(range(units.starts[unit], units.starts[unit] + units.size))
        return WeightSlice(dim, tuple(sorted(indices))) if indices else None

    def _check_target_module_exists(self, peft_config: HeadSparseConfig, key: str) -> bool | re.Match[str] | None:
        if self._weight_slice(peft_config, key) is None:
            return False
        if peft_config.target_modules is None:
            peft_config = copy.copy(peft_config)
            peft_config.target_modules = {key}
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: HeadSparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        weight_slice = self._weight_slice(peft_config, current_key)
        assert weight_slice is not None  # only modules with a part in the heads are targeted
        if isinstance(target, HeadSparseLayer):
            target.update_layer(adapter_name, weight_slice, peft_config)
            return
        # whether it is active, and trainable, is set for all layers together when each is in place
        self._replace_module(parent, target_name, Linear(target, adapter_name, weight_slice, peft_config), target)

    def _layers(self) -> list[HeadSparseLayer]:
        return [module for module in self.model.modules() if isinstance(module, HeadSparseLayer)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT puts a new parameter in the place of one that it casts, and that one is always trainable, also for an
        # adapter that is inactive or was loaded for inference.
        deltas = [layer.head_sparse_delta for layer in self._layers() if adapter_name in layer.head_sparse_delta]
        trainable = [delta[adapter_name].requires_grad for delta in deltas]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for delta, requires_grad in zip(deltas, trainable, strict=True):
            delta[adapter_name].requires_grad_(requires_grad)

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        """Look for NaNs in all layers before the first of them is merged."""
        for layer in self._layers():
            with onload_layer(layer):
                layer.check_merge(adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if safe_merge:
            self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> torch.nn.Module:
        if merge and safe_merge:
            self._check_merge(adapter_names)
        # annotated with None, but it returns the model
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
