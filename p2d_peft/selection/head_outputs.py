"""What the selected heads put out, in a forward pass that stops after the deepest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn

from ..heads import HeadSet, ModelGeometry


class RestNotNeeded(Exception):  # noqa: N818 (a signal, as StopIteration is)
    """Ends a forward pass of which the rest is not needed."""


@contextmanager
def captured_head_outputs(
    model: nn.Module, heads: HeadSet
) -> Iterator[Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    """
    Context that gives a function from a batch to the outputs of the heads, which are the columns of the output
    projection's input. The pass ends there in the deepest layer: later layers and the LM head are never run.

    Args:
        model (`nn.Module`): The model; hooks are on it only within the context.
        heads (`HeadSet`): The heads to watch.

    Yields:
        `Callable`: takes the model's keyword arguments, returns a tensor of shape (B, T, number of heads, D) in the
        order of `heads`, in the dtype of the model's activations.
    """
    geometry = ModelGeometry.of(model)
    by_layer = geometry.check(heads).by_layer()
    seen: dict[int, torch.Tensor] = {}
    deepest = max(by_layer)

    def hook_for(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        units = geometry[layer].o
        columns = units.indices(by_layer[layer])

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            outputs = args[0].index_select(-1, columns.to(args[0].device))
            seen[layer] = outputs.unflatten(-1, (len(by_layer[layer]), units.size))
            if layer == deepest:
                raise RestNotNeeded

        return keep

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.clear()
        with suppress(RestNotNeeded):
            model(**batch, use_cache=False)
        device = seen[deepest].device
        return torch.cat([seen[layer].to(device) for layer in sorted(by_layer)], dim=2)

    with ExitStack() as hooks:
        for layer in by_layer:
            output_projection = model.get_submodule(geometry[layer].o.module)
            hooks.callback(output_projection.register_forward_pre_hook(hook_for(layer)).remove)
        yield run
