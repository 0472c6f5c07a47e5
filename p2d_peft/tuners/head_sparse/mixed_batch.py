"""Batches in which each row has an adapter of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import HeadSparseLayer


def _give(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: Sequence[str]) -> tuple[Any, Any]:
    """A forward pre-hook that adds the argument `adapter_names`."""
    return args, {**kwargs, "adapter_names": adapter_names}


@contextmanager
def adapter_names_given(tuner: BaseTuner, adapter_names: Sequence[str] | None, num_beams: Any) -> Iterator[None]:
    """
    Within this context each row of a batch uses its own adapter.

    Args:
        tuner (`BaseTuner`): The tuner.
        adapter_names (`Sequence[str]` or `None`): An adapter for each row, `"__base__"` for none; `None` does nothing.
        num_beams (`Any`): The argument of `generate`, if there is one.

    Raises:
        `ValueError`: if the model is in training mode, or if there is no such adapter.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    # each layer may lack some of the adapters, but one that all of them lack is a typing error
    layers = [module for module in tuner.modules() if isinstance(module, HeadSparseLayer)]
    known = {"__base__"}.union(*(layer.head_sparse_slice for layer in layers))
    if not known.issuperset(adapter_names):
        unknown = ", ".join(sorted(set(adapter_names) - known))
        raise ValueError(f"Trying to infer with non-existing adapter(s): {unknown}")

    # Beam search repeats each row, but an encoder sees the rows before that.
    encoder_modules: set[nn.Module] = set()
    repeats = num_beams if isinstance(num_beams, int) else 1
    if repeats > 1 and hasattr(tuner.model, "get_encoder"):
        encoder = tuner.model.get_encoder()
        if encoder is not None and encoder is not tuner.model:  # models without one give themselves
            encoder_modules = set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(repeats)]
    handles = [
        module.register_forward_pre_hook(
            partial(_give, adapter_names=adapter_names if module in encoder_modules else repeated), with_kwargs=True
        )
        for module in tuner.modules()
        if isinstance(module, (HeadSparseLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
