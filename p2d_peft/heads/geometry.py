"""
Which heads a model has, and where they are.

[`ModelGeometry`] is what the rest of the library asks. It is put together from [`AttentionGeometry`] (what a head is),
`layouts.py` (how attention classes hold their heads) and `discovery.py` (which modules those are).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ..model_checks import check_module
from .attention_geometry import COLUMNS, ROLES, ROWS, AttentionGeometry, Role, Units
from .discovery import HOW_TO_DESCRIBE, base_layer, find_attentions
from .head_set import Head, HeadSet, Layer


__all__ = ["COLUMNS", "ROLES", "ROWS", "AttentionGeometry", "ModelGeometry", "Role", "Units", "base_layer"]


@dataclass(frozen=True)
class ModelGeometry(Mapping[Layer, AttentionGeometry]):
    """
    The heads of a model: a mapping from the address of each layer with attention heads to its [`AttentionGeometry`].

    The address is the layer's number; in models with several stacks of attention it is `"<stack>.<number>"`, where the
    stack is `encoder` or `decoder` for self-attention and `cross` for cross-attention. Layers without such heads
    (state-space or linear-attention layers of a hybrid) have no entry; the others keep the model's numbers. Build it
    with [`ModelGeometry.of`].
    """

    attentions: dict[Layer, AttentionGeometry]

    @classmethod
    def of(cls, model: nn.Module) -> ModelGeometry:
        """
        Read the geometry off a model's modules. No weight is touched, so quantized, sharded and meta models do too.

        Args:
            model (`nn.Module`): A transformers model or a model that contains one; adapters may be attached.

        Raises:
            `ValueError`: if the model has attention of a layout that is not known, or no attention at all. The
                message names the module, what was found there and how to describe it.
            `TypeError`: if it is no model.
        """
        check_module(model)
        attentions = find_attentions(model)
        if not attentions:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no attention heads: no attention module was found in it. "
                f"{HOW_TO_DESCRIBE}."
            )
        return cls(attentions)

    def __getitem__(self, layer: Layer) -> AttentionGeometry:
        return self.attentions[layer]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.attentions)

    def __len__(self) -> int:
        return len(self.attentions)

    @property
    def heads(self) -> HeadSet:
        """All heads of the model."""
        return HeadSet(Head(layer, head) for layer, attention in self.items() for head in range(attention.n_heads))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the stacks of attention; empty where there is one and layers are plain numbers."""
        return tuple(sorted({layer.rpartition(".")[0] for layer in self if isinstance(layer, str)}))

    @property
    def rows(self) -> tuple[Layer, ...]:
        """
        The layers that the rows of a table of heads stand for: in a model with one stack of attention all from 0 to the
        last one with heads, so that a row's index is the layer's number; else the addresses of those with heads.
        """
        return tuple(self) if self.stacks else tuple(range(max(self) + 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H): the number of [`~ModelGeometry.rows`], and the largest number of heads a layer."""
        return len(self.rows), max(attention.n_heads for attention in self.values())

    def check(self, heads: HeadSet) -> HeadSet:
        """
        Check that the model has all of `heads`, and hand them back.

        Raises:
            `ValueError`: if `heads` is empty or holds a head that the model lacks; the message names it and the valid
                range.
        """
        if not heads:
            raise ValueError("`heads` is empty; it must hold at least one (layer, head) pair.")
        for layer, head in heads:
            if layer not in self:
                contiguous = list(self) == list(range(len(self)))
                layers = f"0 to {len(self) - 1}" if contiguous else ", ".join(map(str, self))
                raise ValueError(f"`heads` holds ({layer}, {head}), but layer {layer} has no heads; layers: {layers}.")
            if head >= self[layer].n_heads:
                raise ValueError(
                    f"`heads` holds ({layer}, {head}), but layer {layer} has the heads 0 to {self[layer].n_heads - 1}."
                )
        return heads
