"""
The gradients of the selected heads' weights, sample by sample, without a backward pass for each sample.

A slice is what heads of one layer own of one projection: rows of q, k and v, columns of o. For a linear map with inputs
`a` and output gradients `g`, its gradient on sample b is the sum over the tokens of the outer products of the slice's
rows of `g` and its columns of `a`. Both are there after one backward pass for a whole batch.

Legend: B samples, T tokens, R rows of a slice, C columns of a slice, P and S what they are projected to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ..heads import HeadSet, ModelGeometry
from ..heads.geometry import COLUMNS, ROLES
from ..heads.samples import sample_losses


@dataclass(frozen=True)
class Slice:
    """
    What the selected heads of one layer own of one projection, in one role.

    Args:
        module (`str`): Full name of the projection.
        rows (`torch.Tensor` or `None`): Shape (R,), int64: its outputs; None for all.
        columns (`torch.Tensor` or `None`): Shape (C,), int64: its inputs; None for all.
    """

    module: str
    rows: torch.Tensor | None
    columns: torch.Tensor | None


# (number of the slice, output gradients of shape (B, T, R), inputs of shape (B, T, C), float32) -> (B, features)
SliceGradient: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def slices_of(geometry: ModelGeometry, heads: HeadSet) -> list[Slice]:
    """The slices of heads: for each layer their rows of q, their groups' rows of k and v, and their columns of o."""
    found = []
    for layer, chosen in geometry.check(heads).by_layer().items():
        for role in ROLES:
            units = geometry[layer].units(role)
            indices = units.indices(geometry[layer].units_of(role, chosen))
            rows, columns = (None, indices) if units.dim == COLUMNS else (indices, None)
            found.append(Slice(units.module, rows, columns))
    return found


def whole_gradient(number: int, gradient_BTR: torch.Tensor, input_BTC: torch.Tensor) -> torch.Tensor:
    """Each sample's gradient of a slice as it is: shape (B, R * C)."""
    return torch.einsum("btr,btc->brc", gradient_BTR, input_BTC).flatten(1)


class ProjectedGradient:
    """
    Each sample's gradient of a slice, projected by two random matrices, one for its rows and one for its columns, as in
    LoGra (arXiv 2405.13954): shape (B, P * S). The gradient itself is never built. Inner products are kept on average,
    with an error that shrinks as there are more slices; a side that is small enough already stays as it is.

    Args:
        n_rows, n_columns (`int`): P and S.
        seed (`int`): The same seed gives the same matrices.
    """

    def __init__(self, n_rows: int, n_columns: int, seed: int) -> None:
        self._sizes = (n_rows, n_columns)
        self._seed = seed
        self._matrices: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, number: int, gradient_BTR: torch.Tensor, input_BTC: torch.Tensor) -> torch.Tensor:
        gradient_BTP = self._project(number, 0, gradient_BTR)
        input_BTS = self._project(number, 1, input_BTC)
        return torch.einsum("btp,bts->bps", gradient_BTP, input_BTS).flatten(1)

    def _project(self, number: int, side: int, values: torch.Tensor) -> torch.Tensor:
        width, size = values.shape[-1], self._sizes[side]
        if width <= size:
            return values
        if (number, side) not in self._matrices:
            # of the slice's number, so that the matrices do not depend on which slice is seen first
            generator = torch.Generator().manual_seed(hash((self._seed, number, side)) % 2**63)
            matrix = torch.randn(width, size, generator=generator) / size**0.5
            self._matrices[number, side] = matrix.to(values.device)
        return values @ self._matrices[number, side]


@contextmanager
def head_gradients(
    model: nn.Module, heads: HeadSet, of_slice: SliceGradient
) -> Iterator[Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    """
    Context that gives a function from a batch to each sample's gradients in the heads' weights.

    No weight gets a gradient, so weights may be frozen, quantized or sharded, and biases are left out. The backward pass
    ends in the lowest layer with selected heads. What a sample gets depends on no other sample of the batch.

    Args:
        model (`nn.Module`): The model, with `requires_grad=False` on all parameters; hooks are on it only within the
            context.
        heads (`HeadSet`): The heads.
        of_slice (`Callable`): [`whole_gradient`] or a [`ProjectedGradient`].

    Yields:
        `Callable`: takes a batch with labels, returns a tensor of shape (B, features), float32, on the CPU: the gradients
        of each sample's own mean loss, slice after slice.
    """
    slices = slices_of(ModelGeometry.of(model), heads)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            # nothing below the lowest projections requires a gradient, so the graph begins here
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            inputs[name] = args[0].detach()
            return outputs[name]

        return keep

    def gradients_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        n_samples = len(batch["input_ids"])
        inputs.clear()
        outputs.clear()
        with torch.enable_grad():
            # of a sum each sample gets the gradient of its own loss, however many there are
            loss = sample_losses(model, batch).sum()
            names = list(outputs)
            gradients = dict(zip(names, torch.autograd.grad(loss, [outputs[name] for name in names]), strict=True))
        parts = []
        with torch.autocast(loss.device.type, enabled=False):  # sums of many tokens want their digits
            for number, part in enumerate(slices):
                # some projections get their tokens along several dims, or those of all samples along one
                gradient, given = (
                    values[part.module].reshape(n_samples, -1, values[part.module].shape[-1])
                    for values in (gradients, inputs)
                )
                if part.rows is not None:
                    gradient = gradient.index_select(-1, part.rows.to(gradient.device))
                if part.columns is not None:
                    given = given.index_select(-1, part.columns.to(given.device))
                parts.append(of_slice(number, gradient.float(), given.float().to(gradient.device)).cpu())
        inputs.clear()
        outputs.clear()
        return torch.cat(parts, dim=1)

    with ExitStack() as hooks:
        for name in dict.fromkeys(part.module for part in slices):
            hooks.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        yield gradients_of
