"""Passes that begin at one layer: what the layers below it put out is kept from an earlier pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .attention_geometry import AttentionGeometry
from .samples import Batch, sample_losses


class LowerLayers:
    """
    The layers below one, for methods that change that one and run the same batches many times.

    Within [`~LowerLayers.kept`] the first pass over a batch is a whole one. In later ones the layers below are not run: each
    gives what the last of them gave then, which is all that the layers above see of them. Nothing that changes their output
    (their weights, the embeddings, the mode) may change in between.

    A model may want more of its layers than that (keys and values that later layers share, a module that is several
    layers at once). So the losses of one batch are computed both ways first, with a pass over other tokens in between, and
    where they are not the same bit for bit, every pass is a whole one. So it is, too, where a weight that is to be changed
    is one of the layers below as well.

    Args:
        model (`nn.Module`): The model, as it will be run.
        attention (`AttentionGeometry`): The attention of the layer where passes begin.
        batch (`Batch`): What [`right_padded`] gives, to try it with.
        changed (`Iterable[nn.Parameter]`, *optional*): The weights that will change between passes.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionGeometry,
        batch: Batch,
        changed: Iterable[nn.Parameter] = (),
    ) -> None:
        self._below = _layers_below(model, attention.name)
        of_layers_below = {id(weight) for layer in self._below for weight in layer.parameters()}
        if not of_layers_below.isdisjoint(map(id, changed)):
            self._below = []
        # by id; with the batch itself, so that no other one gets its id
        self._outputs: dict[int, tuple[Batch, Any]] = {}
        if self._below and not self._is_the_same(model, batch):
            self._below = []

    @torch.no_grad()
    def _is_the_same(self, model: nn.Module, batch: Batch) -> bool:
        with self.kept(batch):
            whole = sample_losses(model, batch)
        # what a layer hands on beside its output is then of these tokens
        sample_losses(model, {**{key: batch[key][:1] for key in batch}, "input_ids": batch["input_ids"][:1].flip(1)})
        try:
            with self.kept(batch):
                return torch.equal(sample_losses(model, batch), whole)
        except Exception:  # whatever the model's code then stumbles over
            return False

    @contextmanager
    def kept(self, batch: Batch) -> Iterator[None]:
        """
        Context for one pass over a batch.

        Args:
            batch (`Batch`): The batch; the same object each time, as that is how it is known.
        """
        if not self._below:
            yield
        elif id(batch) in self._outputs:
            with _giving(self._below, self._outputs[id(batch)][1]):
                yield
        else:
            given: list[Any] = []
            handle = self._below[-1].register_forward_hook(lambda module, args, output: given.append(output))
            try:
                yield
            finally:
                handle.remove()
            # not once: the module is several layers, or none in this pass
            if len(given) == 1:
                self._outputs[id(batch)] = batch, _detached(given[0])


def _layers_below(model: nn.Module, attention: str) -> list[nn.Module]:
    """The layers before the one that an attention module is in: those of the outermost list on the way to it."""
    parts = attention.split(".")
    for depth in range(1, len(parts)):
        layers = model.get_submodule(".".join(parts[:depth]))
        if isinstance(layers, nn.ModuleList):
            return list(layers)[: int(parts[depth])]
    return []


@contextmanager
def _giving(layers: list[nn.Module], output: Any) -> Iterator[None]:
    """Context in which layers do nothing but give an output."""
    # Accelerate, too, puts a forward on the instance
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.forward = lambda *args, **kwargs: output
        yield
    finally:
        for layer, forward in replaced:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _detached(output: Any) -> Any:
    """A layer's output, a tensor or a tuple with some, without the way back through the layers below."""
    if isinstance(output, tuple):
        return tuple(_detached(part) for part in output)
    return output.detach() if isinstance(output, torch.Tensor) else output
