"""Leaving a model as it was found: what the stages switch on is put back, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


# By this attribute a 4-bit layer of bitsandbytes knows that it runs on a CPU for which it reorders weights.
_REORDERS = "support_avx512bf16_for_cpu"


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """
    Context in which a model's train/eval modes, `requires_grad` flags and the random number generators may be changed;
    on leaving, also through an exception, all of them are what they were.

    Within it bitsandbytes reorders no 4-bit weights. On CPUs with AVX512-BF16 it does so in the first pass in eval mode
    whose input needs no gradient, for good: no gradient comes through such weights, not in a later training either.

    Weights are not saved: whoever changes them puts them back. Hooks belong to whoever adds them, too.

    Args:
        model (`nn.Module`): The model to watch over.
    """
    training = [(module, module.training) for module in model.modules()]
    reordering = [module for module in model.modules() if getattr(module, _REORDERS, False)]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = sorted({p.device.index for p in model.parameters() if accelerator and p.device.type == accelerator.type})
    try:
        for module in reordering:
            setattr(module, _REORDERS, False)
        with torch.random.fork_rng(devices=devices, device_type=accelerator.type if accelerator else "cuda"):
            yield
    finally:
        for module in reordering:
            setattr(module, _REORDERS, True)
        # Module.train() and requires_grad_() would also change what lies below, so each is set by itself.
        for module, mode in training:
            module.training = mode
        for parameter, flag in requires_grad:
            parameter.requires_grad = flag


def uncompiled() -> AbstractContextManager[None]:
    """Context in which nothing compiled runs: code that was compiled without a stage's hooks would not call them."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def autocast_without_cache(model: nn.Module) -> AbstractContextManager[None]:
    """
    The caller's autocast, if there is one, without its cache: that would keep the low-precision copies of the weights
    until the caller leaves it, and what a stage changes in the weights would have no effect on later passes.
    """
    kind = model_device(model).type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def where_float64_is(values: torch.Tensor) -> torch.Tensor:
    """The values where they are, or on the CPU where their device knows no float64 (MPS)."""
    return values.cpu() if values.device.type == "mps" else values


def model_device(model: nn.Module) -> torch.device:
    """
    The device on which a model expects its inputs: that of its input embeddings, or of its first parameter, or the one that
    Accelerate brings those to where they are offloaded.
    """
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_input_embeddings() if get_input_embeddings is not None else None
    module = model if embeddings is None else embeddings
    device: torch.device = next(module.parameters()).device
    if device.type == "meta":
        device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or device)
    return device


def model_id(model: nn.Module) -> str | None:
    """The Hub id or path that a transformers model was loaded from, if it says so."""
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or None
