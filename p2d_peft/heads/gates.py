"""A factor on each head's output: what `gate` differentiates for and `ablation` sets to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .geometry import ModelGeometry
from .head_set import Layer


@contextmanager
def gated(model: nn.Module, geometry: ModelGeometry, gates: Mapping[Layer, torch.Tensor]) -> Iterator[None]:
    """
    Context in which the outputs of heads are multiplied by gates.

    A head's output is its columns of the output projection's input, so the weights are not looked at and may be
    quantized. A factor of 1 changes no bit.

    Args:
        model (`nn.Module`): The model; hooks are on it only within the context.
        geometry (`ModelGeometry`): Its heads.
        gates (`Mapping[int | str, torch.Tensor]`):
            For each layer to gate, the factors of its heads: shape (B, H), or (1, H) for all samples alike. They may
            require gradients, and may be changed in place between passes that are not differentiated.
    """

    def hook_for(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        # the units of o follow one another and cover the projection's input, so each factor is spread over its unit
        size = geometry[layer].o.size

        def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            outputs_BTF = args[0]
            factors_B1F = gates[layer].to(outputs_BTF).repeat_interleave(size, dim=-1)[:, None]
            return (outputs_BTF * factors_B1F, *args[1:])

        return multiply

    with ExitStack() as hooks:
        for layer in gates:
            projection = model.get_submodule(geometry[layer].o.module)
            hooks.callback(projection.register_forward_pre_hook(hook_for(layer)).remove)
        yield
