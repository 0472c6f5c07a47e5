"""
What a head is: which rows and columns of which projection make up query head `i` of one attention module.

Everything that touches the slices of a head, the localization methods, the adapter and the scorers, asks here. The
only thing a layout has to say is where its units lie ([`Units`]); all else follows from that.

Covered: attention with separate `q_proj`, `k_proj`, `v_proj` and `o_proj` (MHA, GQA, MQA; biases; q/k norms; any head
dimension), as in Llama, Mistral, Qwen2, Qwen3, Gemma 3 and their kin. Other attention is refused by name.

Legend: L layers, H query heads a layer, G key/value heads (groups) a layer, D head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .head_set import Head, HeadSet


Role = Literal["q", "k", "v", "o"]
ROLES: tuple[Role, ...] = ("q", "k", "v", "o")
# dim of a weight of shape (out_features, in_features) along which the units of a role lie
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Units:
    """
    Where the equal units of one role lie in one projection: unit `u` is the `size` rows (or columns) from `starts[u]`.

    Args:
        module (`str`): Full name of the projection within the model, such as `"model.layers.3.self_attn.q_proj"`.
        dim (`int`): 0 where the units are rows of the weight (outputs: q, k, v), 1 where they are columns (inputs: o).
        starts (`tuple[int, ...]`): First row or column of each unit.
        size (`int`): Rows or columns a unit.
    """

    module: str
    dim: int
    starts: tuple[int, ...]
    size: int

    def indices(self, units: Iterable[int]) -> torch.Tensor:
        """The rows or columns of the given units: an int64 tensor of shape (len(units) * size,), in ascending order."""
        starts = torch.tensor(sorted(self.starts[unit] for unit in units), device="cpu")
        return (starts[:, None] + torch.arange(self.size, device="cpu")).flatten()


@dataclass(frozen=True)
class AttentionGeometry:
    """
    The heads of one attention module.

    Args:
        name (`str`): Full name of the attention module within the model.
        layer (`int`): The layer's number in the model.
        n_heads (`int`): H, query heads.
        n_kv_heads (`int`): G, key/value heads.
        head_dim (`int`): D.
        q, k, v, o (`Units`): H units for `q` and `o`, G units for `k` and `v`.
    """

    name: str
    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q: Units
    k: Units
    v: Units
    o: Units

    def group(self, head: int) -> int:
        """The key/value group that query head `head` reads: `head * G // H`."""
        return head * self.n_kv_heads // self.n_heads

    def units(self, role: Role) -> Units:
        """The units of one role."""
        units: Units = getattr(self, role)
        return units

    def units_of(self, role: Role, heads: Iterable[int]) -> list[int]:
        """The units of a role that the given query heads use: the heads themselves, or their groups without repeats."""
        return sorted({self.group(head) if role in ("k", "v") else head for head in heads})

    def head_slice(self, role: Role, head: int) -> slice:
        """The rows (q, k, v) or columns (o) of the role's projection that query head `head` uses."""
        units = self.units(role)
        start = units.starts[self.units_of(role, [head])[0]]
        return slice(start, start + units.size)


@dataclass(frozen=True)
class ModelGeometry(Mapping[int, AttentionGeometry]):
    """
    The heads of a model: a mapping from the number of each layer with attention heads to its [`AttentionGeometry`].

    Layers without such heads (state-space or linear-attention layers of a hybrid) have no entry; the others keep the
    model's numbers. Build it with [`ModelGeometry.of`].
    """

    attentions: dict[int, AttentionGeometry]

    @classmethod
    def of(cls, model: nn.Module) -> ModelGeometry:
        """
        Read the geometry off a model's modules. No weight is touched, so quantized, sharded and meta models do too.

        Args:
            model (`nn.Module`): A transformers model or a model that contains one; adapters may be attached.

        Raises:
            `ValueError`: if the model has attention of a layout that is not covered, or no attention at all. The
                message names the module and what was found there.
        """
        found: dict[int, AttentionGeometry] = {}
        refused: list[str] = []
        for name, module in model.named_modules():
            if not _is_attention(name, module):
                continue
            try:
                geometry = _separate_projections(name, module)
            except ValueError as error:
                refused.append(str(error))
                continue
            if geometry.layer in found:
                refused.append(
                    f"'{name}' ({type(module).__name__}) has the same layer number as '{found[geometry.layer].name}'; "
                    "models with several stacks of attention are not supported yet"
                )
                continue
            found[geometry.layer] = geometry
        if refused:
            more = f" (and {len(refused) - 1} more like it)" if len(refused) > 1 else ""
            raise ValueError(f"Unsupported attention in `model` ({type(model).__name__}): {refused[0]}{more}.")
        if not found:
            raise ValueError(
                f"`model` ({type(model).__name__}) has no attention heads: no module with the children "
                "q_proj, k_proj, v_proj and o_proj was found in it."
            )
        return cls(dict(sorted(found.items())))

    def __getitem__(self, layer: int) -> AttentionGeometry:
        return self.attentions[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.attentions)

    def __len__(self) -> int:
        return len(self.attentions)

    @property
    def heads(self) -> HeadSet:
        """All heads of the model."""
        return HeadSet(Head(layer, head) for layer, attention in self.items() for head in range(attention.n_heads))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H): the number of layers up to the last one with heads, and the largest number of heads a layer."""
        return max(self) + 1, max(attention.n_heads for attention in self.values())

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
                layers = f"0 to {max(self)}" if len(self) == max(self) + 1 else ", ".join(map(str, self))
                raise ValueError(f"`heads` holds ({layer}, {head}), but layer {layer} has no heads; layers: {layers}.")
            if head >= self[layer].n_heads:
                raise ValueError(
                    f"`heads` holds ({layer}, {head}), but layer {layer} has the heads 0 to {self[layer].n_heads - 1}."
                )
        return heads


def _is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module computes softmax attention itself, as far as its children or its class name tell."""
    children = {child for child, _ in module.named_children()}
    if {"q_proj", "k_proj", "v_proj"} <= children:
        return True
    # Attention of other layouts has to be noticed in order to be refused. A wrapper of an attention module (ViTAttention
    # around ViTSelfAttention) is refused just as well.
    own_parameters = any(True for _ in module.parameters())
    return own_parameters and re.search(r"Attention\d*$", type(module).__name__) is not None


def _separate_projections(name: str, module: nn.Module) -> AttentionGeometry:
    """The geometry of a module with the children q_proj, k_proj, v_proj and o_proj; `ValueError` for any other."""
    children = dict(module.named_children())
    what = f"'{name}' ({type(module).__name__})"
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(children):
        raise ValueError(
            f"{what} has the children {sorted(children)}; supported are separate q_proj, k_proj, v_proj and o_proj"
        )
    out_features: dict[str, int] = {}
    in_features: dict[str, int] = {}
    for role in ROLES:
        base = base_layer(children[f"{role}_proj"])
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{what} has a {role}_proj of type {type(base).__name__}; supported are linear layers")
        # read from the attributes: the shape of a quantized or sharded weight says nothing
        out_features[role], in_features[role] = base.out_features, base.in_features
    head_dim = getattr(module, "head_dim", None)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(head_dim, int) or not isinstance(layer, int):
        raise ValueError(f"{what} has no integer attributes `head_dim` and `layer_idx`")

    # The output projection reads exactly the heads' outputs; a query projection may hold more than queries (a gate).
    n_heads, n_kv_heads = in_features["o"] // head_dim, out_features["k"] // head_dim
    expected = {"q": n_heads * head_dim, "k": n_kv_heads * head_dim, "v": n_kv_heads * head_dim}
    widths = {role: out_features[role] for role in expected}
    if widths != expected or in_features["o"] != n_heads * head_dim or n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(
            f"{what} has projections of widths {widths} (q, k, v out) and {in_features['o']} (o in) with `head_dim` "
            f"{head_dim}, which do not divide into {n_heads} query heads and {n_kv_heads} key/value heads"
        )

    def units(role: Role, count: int, dim: int) -> Units:
        return Units(f"{name}.{role}_proj", dim, tuple(range(0, count * head_dim, head_dim)), head_dim)

    return AttentionGeometry(
        name=name,
        layer=layer,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        q=units("q", n_heads, ROWS),
        k=units("k", n_kv_heads, ROWS),
        v=units("v", n_kv_heads, ROWS),
        o=units("o", n_heads, COLUMNS),
    )


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that adapters wrap, or the module itself where none does."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module
