"""
HeadSparse adapters as LoRA, for programs that know only that.

A delta on N rows of a weight is the product of a (out_features, N) matrix that puts each row in its place, all zeros
and ones, and the (N, in_features) delta: a LoRA of rank N, exactly. For columns the delta comes first and the zeros and
ones, (N, in_features), pick the inputs.

Legend of tensor shapes: I input features, O output features, N rows or columns of the slice, R rank.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...argument_checks import check_count
from ...files import json_text, replacing
from ...heads.discovery import base_layer
from ...heads.geometry import ROWS
from ...model_state import where_float64_is
from .config import HEAD_SPARSE, HeadSparseConfig
from .layer import HeadSparseLayer
from .names import WRAPPERS, without


logger = logging.getLogger(__name__)

# PEFT's own file format puts this in front of each name of the base model.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraReport:
    """
    How close a LoRA is to the HeadSparse adapter that it was made from.

    Args:
        ranks (`dict[str, int]`): For each module, by its full name in the base model, the rank of its LoRA.
        errors (`dict[str, float]`):
            For each module `||delta - B @ A|| / ||delta||` in the Frobenius norm, 0.0 where nothing was cut off.
        error (`float`): The same for all deltas together, as one long vector.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class _ModuleLora:
    """The LoRA of one module, and whether that stores its weight as (I, O)."""

    name: str
    transposed: bool
    A_RI: torch.Tensor
    B_OR: torch.Tensor
    squared_norm: float
    squared_error: float


def convert_to_lora(
    peft_model: nn.Module, adapter_name: str = "default", max_rank: int | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """
    Convert a HeadSparse adapter to LoRA, exactly.

    Each module gets the rank that its delta needs: as many as it has trained rows or columns, or its `r`. The scaling
    is 1 everywhere, also for readers that know no `rank_pattern`: `r` and `lora_alpha` are both the largest rank. What
    else the adapter trains (`modules_to_save`, `trainable_token_indices`) comes along as it is. The model stays as it
    is. Weights that are sharded (FSDP, ZeRO-3) have to be gathered before.

    Args:
        peft_model (`nn.Module`):
            A `PeftModel`, or a transformers model with an adapter of its own (`add_adapter`); compiled, or within
            `DistributedDataParallel`, it is the same.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter; it need not be the active one.
        max_rank (`int`, *optional*):
            Modules of a higher rank are cut down to this one by a singular value decomposition, which loses as little
            of the delta as any LoRA of that rank; [`lora_report`] says how much, and so does the log. By default
            nothing is lost.

    Returns:
        `tuple[LoraConfig, dict[str, torch.Tensor]]`: The configuration, and the weights under the names of PEFT's
        checkpoints: for each module `lora_A.weight` of shape (R, in_features) and `lora_B.weight` of shape
        (out_features, R), in the dtype and on the device of its delta.

    Raises:
        `ValueError`: if there is no such adapter, if it is merged, trains biases or holds NaN or an infinity, or if
            `max_rank` is below 1.
        `TypeError`: if the adapter is of another method than HeadSparse.

    Example:

    ```python
    >>> from p2d_peft.tuners.head_sparse import convert_to_lora

    >>> lora_config, state_dict = convert_to_lora(peft_model)
    >>> lora_config.r
    128
    ```
    """
    lora_config, state_dict, _ = _export(_unwrapped(peft_model), adapter_name, max_rank)
    return lora_config, state_dict


def lora_report(peft_model: nn.Module, adapter_name: str = "default", max_rank: int | None = None) -> LoraReport:
    """
    The ranks and the errors that [`convert_to_lora`] would give with the same arguments, to choose `max_rank` by.

    Args:
        peft_model, adapter_name, max_rank: See [`convert_to_lora`], also for what is raised.

    Returns:
        [`LoraReport`]
    """
    return _report(list(_convert(_unwrapped(peft_model), adapter_name, max_rank)))


def save_as_lora(
    peft_model: nn.Module, folder: str | Path, adapter_name: str = "default", max_rank: int | None = None
) -> LoraReport:
    """
    Convert a HeadSparse adapter to LoRA and save it as PEFT saves adapters: `adapter_model.safetensors` and
    `adapter_config.json`. Both files are complete before they take their names, the configuration last.

    Args:
        folder (`str` or `Path`): Where to save; made if missing. A LoRA that is there already is replaced.
        peft_model, adapter_name, max_rank: See [`convert_to_lora`], also for what is raised.

    Returns:
        [`LoraReport`]

    Example:

    ```python
    >>> from p2d_peft.tuners.head_sparse import save_as_lora

    >>> save_as_lora(peft_model, "lora")
    >>> # in any other process, without p2d_peft
    >>> PeftModel.from_pretrained(base_model, "lora")
    ```
    """
    lora_config, state_dict, report = _export(_unwrapped(peft_model), adapter_name, max_rank)
    lora_config.inference_mode = True  # as PEFT saves adapters
    # sets in a fixed order: the same adapter gives the same file
    fields = {
        name: sorted(value) if isinstance(value, set) else value for name, value in lora_config.to_dict().items()
    }
    folder = Path(folder)
    # what is entered last takes its name first
    with replacing(folder / CONFIG_NAME) as config, replacing(folder / SAFETENSORS_WEIGHTS_NAME) as weights:
        save_file(state_dict, weights, metadata={"format": "pt"})
        config.write_text(json_text(fields), encoding="utf-8")
    return report


def _export(
    peft_model: nn.Module, adapter_name: str, max_rank: int | None
) -> tuple[LoraConfig, dict[str, torch.Tensor], LoraReport]:
    """The LoRA's configuration, its weights and its report."""
    loras = list(_convert(peft_model, adapter_name, max_rank))
    report = _report(loras)
    if report.error:
        for name, error in report.errors.items():
            logger.info("%s: rank %d, relative error %.2e", name, report.ranks[name], error)
        logger.warning(
            "The LoRA of adapter '%s' was cut down to rank %d: its relative error is %.2e as a whole and up to %.2e in a "
            "module.",
            adapter_name,
            max(report.ranks.values()),
            report.error,
            max(report.errors.values()),
        )

    _, config = _find_adapter(peft_model, adapter_name)
    # Readers that know no patterns (vLLM, SGLang) check `r` against their limit and scale by `lora_alpha / r`.
    r = max(report.ranks.values())
    # keys are regular expressions that may match the end of a name; these match one name each, and the whole of it
    pattern = {f"^{re.escape(name)}": rank for name, rank in report.ranks.items() if rank != r}
    lora_config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(report.ranks),
        fan_in_fan_out=any(lora.transposed for lora in loras),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
    )
    state_dict: dict[str, torch.Tensor] = {}
    for lora in loras:
        state_dict[f"{_PREFIX}{lora.name}.lora_A.weight"] = lora.A_RI
        state_dict[f"{_PREFIX}{lora.name}.lora_B.weight"] = lora.B_OR
    for name, tensor in get_peft_model_state_dict(peft_model, adapter_name=adapter_name).items():
        if ".head_sparse_" not in name:
            # a copy: it may share its memory with the model, or with another entry
            name = without(name.removeprefix(_PREFIX), WRAPPERS)
            state_dict[_PREFIX + name] = tensor.detach().clone().contiguous()
    return lora_config, state_dict, report


def _report(loras: list[_ModuleLora]) -> LoraReport:
    def relative(squared_error: float, squared_norm: float) -> float:
        return math.sqrt(squared_error / squared_norm) if squared_error else 0.0

    return LoraReport(
        ranks={lora.name: len(lora.A_RI) for lora in loras},
        errors={lora.name: relative(lora.squared_error, lora.squared_norm) for lora in loras},
        error=relative(sum(lora.squared_error for lora in loras), sum(lora.squared_norm for lora in loras)),
    )


def _unwrapped(model: Any) -> nn.Module:
    """A model without what compiles it or spreads it over devices, in whichever order."""
    # not accelerate's `extract_model_from_parallel`: up to 1.10 at least it fails where modules within are compiled
    if is_compiled_module(model):
        return _unwrapped(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    unwrapped: nn.Module = model
    return unwrapped


def _find_adapter(peft_model: nn.Module, adapter_name: str) -> tuple[nn.Module, HeadSparseConfig]:
    """The base model, with the adapter's layers in it, and the adapter's configuration."""
    configs = getattr(peft_model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"`peft_model` has no adapter '{adapter_name}'; its adapters: {sorted(configs)}.")
    config = configs[adapter_name]
    if config.peft_type != HEAD_SPARSE:
        raise TypeError(f"Adapter '{adapter_name}' is of the type {config.peft_type}, not a HeadSparse adapter.")
    return (peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model), config


def _convert(peft_model: nn.Module, adapter_name: str, max_rank: int | None) -> Iterator[_ModuleLora]:
    """The LoRA of each module of an adapter, in the order of the model."""
    base, config = _find_adapter(peft_model, adapter_name)
    if config.bias != "none":
        raise ValueError(
            f"Adapter '{adapter_name}' trains biases (`bias='{config.bias}'`), which no LoRA holds; merge it."
        )
    if max_rank is not None:
        check_count("max_rank", max_rank)
    for name, layer in base.named_modules():
        if not isinstance(layer, HeadSparseLayer) or adapter_name not in layer.head_sparse_slice:
            continue
        if adapter_name in layer.merged_adapters:
            # the base weight in memory has the delta in it: a LoRA on top of it would count it twice
            raise ValueError(f"Adapter '{adapter_name}' is merged; call `unmerge_adapter()` first.")
        # a part of the model may be wrapped by itself; who loads the LoRA has the model without that
        yield _convert_layer(without(name, WRAPPERS), layer, adapter_name, max_rank)


@torch.no_grad()
def _convert_layer(name: str, layer: HeadSparseLayer, adapter_name: str, max_rank: int | None) -> _ModuleLora:
    """The LoRA of one module."""
    left, right = map(where_float64_is, _factors(layer, adapter_name))
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError(
            f"Adapter '{adapter_name}' holds NaN or an infinity in '{name}'; its training went wrong. Take an earlier "
            "checkpoint."
        )
    exact, squared_error = left.double() @ right.double(), 0.0
    if max_rank is not None and len(right) > max_rank:
        dtype = left.dtype
        # of all LoRAs of this rank the nearest one (Eckart and Young); there is no SVD in half precision
        U, S, V = torch.linalg.svd(left.float() @ right.float(), full_matrices=False)
        left, right = (U[:, :max_rank] * S[:max_rank]).to(dtype), V[:max_rank].to(dtype)
        # what the file will hold, rounding included
        squared_error = (exact - left.double() @ right.double()).square().sum().item()

    weight_slice = layer.head_sparse_slice[adapter_name]
    index_N = torch.tensor(weight_slice.indices, device=left.device)
    if weight_slice.dim == ROWS:
        A_RI, B_OR = right.clone(), left.new_zeros(layer.out_features, left.shape[1])
        B_OR[index_N] = left
    else:
        A_RI, B_OR = right.new_zeros(len(right), layer.in_features), left.clone()
        A_RI[:, index_N] = right
    transposed = isinstance(base_layer(layer), Conv1D)
    squared_norm = exact.square().sum().item()
    return _ModuleLora(name, transposed, A_RI.contiguous(), B_OR.contiguous(), squared_norm, squared_error)


def _factors(layer: HeadSparseLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter's slice of a layer, (N, I) for rows or (O, N) for columns, as a product of two factors of full rank."""
    if adapter_name in layer.head_sparse_A:
        return layer.head_sparse_B[adapter_name].weight, layer.head_sparse_A[adapter_name].weight
    delta = layer.head_sparse_delta[adapter_name].weight
    # One factor is the delta, the other the identity of its shorter side. That side is nearly always the slice's N; with
    # all heads of a fused projection there are more rows than input features.
    rows, columns = delta.shape
    if rows <= columns:
        return delta.new_ones(rows).diag(), delta
    return delta, delta.new_ones(columns).diag()
