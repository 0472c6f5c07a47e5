"""
What a head is: which rows and columns of which projection make up query head `i` of one attention module.

Everything that touches the slices of a head, the localization methods, the adapter and the scorers, asks here. The
only thing a layout has to say is where its units lie ([`Units`]); all else follows from that.

Legend: L layers, H query heads a layer, G key/value heads (groups) a layer, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from .head_set import Layer


Role = Literal["q", "k", "v", "o"]
ROLES: tuple[Role, ...] = ("q", "k", "v", "o")
# Dim of a linear map's weight of shape (out_features, in_features) along which the units of a role lie: rows are the
# map's outputs, columns its inputs. A layer that stores its weight as (in_features, out_features), such as GPT-2's
# Conv1D, has them the other way around in memory; what is meant here is the map.
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Units:
    """
    Where the equal units of one role lie in one projection: unit `u` is the `size` rows (or columns) from `starts[u]`.

    Args:
        module (`str`):
            Full name of the projection within the model, such as `"model.layers.3.self_attn.q_proj"`. Roles that share
            a fused projection name the same module.
        dim (`int`): 0 where the units are outputs of the projection (q, k, v), 1 where they are its inputs (o).
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
        layer (`int` or `str`): The layer's address in the model, see [`Head`].
        n_heads (`int`): H, query heads.
        n_kv_heads (`int`): G, key/value heads.
        head_dim (`int`):
            D, the size of a head's output. Queries and keys may be of other sizes (latent attention, a query with an
            output gate): the size of a role's units is `units(role).size`.
        q, k, v, o (`Units`): H units for `q` and `o`, G units for `k` and `v`.
    """

    name: str
    layer: Layer
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
