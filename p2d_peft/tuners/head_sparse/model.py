"""The tuner of HeadSparse: finds the slices of the chosen heads in a model and wraps the projections that hold them."""

from __future__ import annotations

import copy
import re
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ...heads.geometry import ROLES, ROWS, AttentionGeometry, ModelGeometry, Role
from .combination import combined_config, combined_delta
from .config import HeadSparseConfig
from .delta import Delta
from .layer import HeadSparseLayer, WeightSlice
from .linear import Linear
from .mixed_batch import adapter_names_given
from .names import COMPILED, NOT_IN_STATE_DICTS, without


# what `torch.compile` puts before the names in a model
_COMPILED = f"{COMPILED}."


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
        peft_config ([`HeadSparseConfig`]): The configuration, or a dictionary from the adapter's name to it.
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

    def __init__(
        self,
        model: nn.Module,
        peft_config: HeadSparseConfig | dict[str, HeadSparseConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        # where the model has adapters already, this dictionary is theirs, and PEFT's tuner writes into it at once
        configs = getattr(model, "peft_config", None)
        before = dict(configs or {})
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            if configs is not None:
                configs.clear()
                configs.update(before)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        try:
            _check_name(adapter_name)
            self._check_injection(self.peft_config[adapter_name], state_dict or {})
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            # for a second adapter this dictionary is the model's own, which then must not list what it does not have
            self.peft_config.pop(adapter_name, None)
            raise

    @classmethod
    def check(cls, model: nn.Module, config: HeadSparseConfig) -> None:
        """
        Check whether a config can be injected into a model, and inject nothing.

        Args:
            model (`nn.Module`): The model.
            config ([`HeadSparseConfig`]): The config, with its heads.

        Raises:
            `ValueError`: if it can't be, with the message that injecting it would give.
        """
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        tuner._check_injection(config, {})

    def _check_injection(self, config: HeadSparseConfig, state_dict: dict[str, torch.Tensor]) -> None:
        """Read the model's geometry and check the config against it, before anything in the model is touched."""
        geometry = ModelGeometry.of(self.model)
        config.set_heads(config.heads)  # someone may have assigned the attribute
        config.head_set(geometry)  # raises if the model lacks one of them
        self._parts = {}
        for attention in geometry.values():
            for role in ROLES:
                self._parts.setdefault(attention.units(role).module, []).append((attention, role))
        holding = [name for name in self._parts if self._weight_slice(config, name) is not None]
        if not holding:
            numbers = ", ".join(map(str, geometry))
            raise NoMatchingPeftModuleError(
                f"`layers_to_transform` ({config.layers_to_transform}) and `layers_pattern` ({config.layers_pattern}) "
                f"have none of the chosen heads ({config.heads}); the model's layers: {numbers}."
            )
        targeted = [name for name in holding if self._check_target_module_exists(config, name)]
        if not targeted:
            raise NoMatchingPeftModuleError(
                f"`target_modules` ({config.target_modules}), `exclude_modules` ({config.exclude_modules}) and "
                f"`modules_to_save` ({config.modules_to_save}) leave nothing to train of the projections that hold the "
                f"chosen heads: '{holding[0]}' to '{holding[-1]}' ({len(holding)} in all)."
            )
        for name in targeted:
            self._check_rank(config, name)
            self._check_not_tensor_parallel(name)
        for key in state_dict:
            name, is_delta, _ = key.partition(f".{self.prefix}")
            if is_delta and self._weight_slice(config, name) is None:
                raise _homeless(name)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        # PEFT passes over weights that the model has no place for, and an adapter of another architecture, or one whose
        # configuration names other heads than it has weights for, would load as if it had learned nothing.
        # The inner one of two modules of the same name comes later.
        modules = {without(name, NOT_IN_STATE_DICTS): module for name, module in self.named_modules()}
        for key in state_dict:
            # the first one: an adapter's name may begin with the prefix, too
            name, is_delta, rest = key.removeprefix(prefix).partition(f".{self.prefix}")
            if not (key.startswith(prefix) and is_delta):
                continue
            if not isinstance(modules.get(name), HeadSparseLayer):
                raise _homeless(name.removeprefix("model."))
            if rest.count(".") < 2:  # of `delta.<adapter>.weight`
                raise _unplaced(name.removeprefix("model."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_rank(self, config: HeadSparseConfig, key: str) -> None:
        """A rank above the slice's own would have more parameters than the slice."""
        weight_slice = self._weight_slice(config, key)
        if config.r is not None and weight_slice is not None and config.r > len(weight_slice.indices):
            raise ValueError(
                f"`r` must be 1 to {len(weight_slice.indices)} for '{key}', which has as many trained rows or columns, "
                f"got {config.r}. `r=None` trains each of their weights."
            )

    def _check_not_tensor_parallel(self, key: str) -> None:
        """A process has other rows or columns of a sharded projection than those that a slice's indices count in."""
        # both are transformers'; the plan is there, too, where the model was not split by it
        n_processes = getattr(self.model, "tp_size", None) or 1
        plan = getattr(self.model, "tp_plan", None) or {}
        if n_processes > 1 and re.sub(r"\.\d+\.", ".*.", key.removeprefix(_COMPILED)) in plan:
            raise ValueError(
                f"`model` is split over {n_processes} processes by tensor parallelism, and with it '{key}', which holds "
                "chosen heads; HeadSparse needs projections that are whole in a forward pass. Load the model without "
                "tensor parallelism (`tp_plan`), or shard it with FSDP or ZeRO-3."
            )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # `target_modules` stays as it was given, where other methods fill it in: the heads say it all, also for a
        # model of another depth or whose modules have other names.
        return peft_config

    def _weight_slice(self, config: HeadSparseConfig, key: str) -> WeightSlice | None:
        """The rows or columns that the config's heads own in the projection named `key`; `None` if there are none."""
        dim = ROWS
        indices: set[int] = set()
        # PEFT takes the prefix off where it goes by the names of a state dict
        plain = key.removeprefix(_COMPILED)
        for attention, role in self._parts.get(plain, []) + self._parts.get(_COMPILED + plain, []):
            if role not in config.roles() or not config.transforms(attention):
                continue
            dim = attention.units(role).dim  # the same for all parts of a projection
            units = attention.units_of(role, config.heads_in(attention.layer, attention.n_heads))
            indices.update(attention.units(role).indices(units).tolist())
        return WeightSlice(dim, tuple(sorted(indices))) if indices else None

    def _check_target_module_exists(self, peft_config: HeadSparseConfig, key: str) -> bool | re.Match[str] | None:
        if self._weight_slice(peft_config, key) is None:
            return False
        peft_config = copy.copy(peft_config)
        # it has no slice in another layer, and PEFT finds no layer's number in a name that starts with `layers.0`
        peft_config.layers_to_transform = peft_config.layers_pattern = None
        if peft_config.target_modules is None:
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
        kwargs = get_quantization_kwargs(self.model)
        layer = Linear(target, adapter_name, weight_slice, peft_config, **kwargs)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also copies weights from the one to the other and moves the deltas. Here they have the same
        # weights, and the deltas start where those are; and it cannot take off the wrapper around trained tokens, whose
        # weight is no parameter.
        setattr(parent, child_name, new_module)

    def _layers(self) -> list[HeadSparseLayer]:
        return [module for module in self.model.modules() if isinstance(module, HeadSparseLayer)]

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # PEFT enters this around `forward` and `generate` with all of their arguments
        return adapter_names_given(self, kwargs.get("adapter_names"), kwargs.get("num_beams"))

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Add an adapter whose delta is the weighted sum of those of other adapters, on the heads of all of them.

        The sum is exact: nothing is cut off, as a delta has each weight of its slices. Where adapters share no slice
        (their heads are of different groups) and the weights are 1, each part of it is an adapter's own delta, bit for
        bit. The new adapter is not active yet, and has no `r`, also if the others have one. There is no
        `combination_type`: the weighted sum is what LoRA's `"linear"` and `"cat"` ask for.

        Args:
            adapters (`list[str]`): The adapters to combine.
            weights (`list[float]`): A weight for each of them; may be negative.
            adapter_name (`str`): The new adapter's name. If there is one of this name already, nothing is done, as in
                the other methods of PEFT.

        Raises:
            `ValueError`: if there is no such adapter, if there are not as many weights as adapters, if one of them
                trains more than heads (`modules_to_save`, `trainable_token_indices`, `bias`), or if their
                `target_modules` or `exclude_modules` differ.
        """
        if adapter_name in self.peft_config:
            return
        config = combined_config(self.peft_config, adapters, weights, ModelGeometry.of(self.model))
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in self._layers():
            if any(name in layer.head_sparse_slice for name in adapters):
                with torch.no_grad():
                    delta = combined_delta(layer, adapters, weights, adapter_name)
                layer.head_sparse_delta[adapter_name] = Delta(delta).requires_grad_(False)

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


def _homeless(name: str) -> ValueError:
    return ValueError(
        f"`state_dict` has a delta for '{name}', which holds none of the config's heads. The adapter belongs to another "
        "model, or its configuration was changed: load it into the model that it was trained on, with the "
        "`adapter_config.json` that was saved beside it."
    )


def _unplaced(name: str) -> ValueError:
    # PEFT adds the adapter's name to the keys of its file, but not where it finds nothing of that adapter by their names
    return ValueError(
        f"`state_dict` has a delta for '{name}' that names no adapter: the adapter that is loaded has none of its heads "
        "there, or the layer is wrapped by FSDP1 or torch's checkpoint wrapper, which hides it from PEFT. Load an adapter "
        "with the `adapter_config.json` that was saved beside it, and before the model is wrapped."
    )


def _check_name(adapter_name: str) -> None:
    """An adapter is saved in a folder of its name, and each layer has its parameters under that name."""
    if "/" in adapter_name or "\\" in adapter_name or adapter_name in ("", ".", ".."):
        raise ValueError(
            f"`adapter_name`={adapter_name!r} is no name for a folder, which it is saved in; leave out '/'."
        )
    # the last name of each parameter is 'weight', by which PEFT would take it for the adapter's
    if "." in adapter_name or adapter_name == "weight" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"`adapter_name`={adapter_name!r} cannot be the name of a module in PyTorch: that has no '.', and is no "
            f"attribute of a module as it is. Take another, such as {'adapter_' + adapter_name.replace('.', '_')!r}."
        )
