"""Which heads of a table of scores are chosen: the best, spread over the layers, or the best for the time they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ..argument_checks import check_share, is_index
from ..printable import shown


# (row, head) of a table
Cell = tuple[int, int]


def number_of_heads(ratio: float | None, k: int | None, n_heads: int) -> int:
    """
    How many heads a share or a number of heads asks for.

    Args:
        ratio (`float`, *optional*): Share in (0, 1]; rounded, and at least one head. 0.1 where `k` is not given either.
        k (`int`, *optional*): The number itself.
        n_heads (`int`): How many there are.

    Raises:
        `TypeError`: if `ratio` is no number or `k` no integer.
        `ValueError`: if both are given, or there are not so many heads, or none at all.
    """
    if not n_heads:
        raise ValueError("There are no heads to choose from: no head has a score.")
    if k is None:
        ratio = 0.1 if ratio is None else ratio
        check_share("ratio", ratio)
        return max(1, round(ratio * n_heads))
    if ratio is not None:
        raise ValueError(f"Give the number of heads as `ratio` or as `k`, not both; got {ratio} and {k}.")
    if not is_index(k):
        raise TypeError(f"`k` must be an integer, got {shown(k)}.")
    if not 1 <= k <= n_heads:
        raise ValueError(f"`k` must be from 1 to {n_heads}, the number of heads, got {k}.")
    return k


# the most heads of one layer, or the least and the most, or as few as their number allows
PerLayer: TypeAlias = "int | tuple[int | None, int | None] | Literal['even'] | None"


def at_one_end(values: torch.Tensor, stacks: Sequence[str], share: float, last: bool) -> Iterator[torch.Tensor]:
    """
    Tables of the heads at one end of each stack of layers, the smallest first: each has a layer more of every stack than the
    one before it, and the last one is the whole.

    Args:
        values (`torch.Tensor`): Shape (L, H).
        stacks (`Sequence[str]`): The stack of each row, whose layers come in order.
        share (`float`): The share of a stack's layers in the first table, in (0, 1]; rounded, and at least one.
        last (`bool`): Whether they are its last layers, rather than its first.

    Yields:
        `torch.Tensor`: shape (L, H), NaN in all other layers.
    """
    rows_of = {name: [row for row, stack in enumerate(stacks) if stack == name] for name in dict.fromkeys(stacks)}
    for more in range(max(map(len, rows_of.values()))):
        table = torch.full_like(values, torch.nan)
        left_out = 0
        for rows in rows_of.values():
            count = min(len(rows), max(1, round(share * len(rows))) + more)
            kept = rows[-count:] if last else rows[:count]
            table[kept] = values[kept]
            left_out += len(rows) - count
        yield table
        if not left_out:
            return


def even_bound(values: torch.Tensor, count: int) -> int:
    """
    The smallest bound on the heads of one layer that leaves `count` of them.

    Args:
        values (`torch.Tensor`): Shape (L, H), NaN where there is no head.
        count (`int`): How many heads are to be chosen; not more than there are.
    """
    n_heads = (~values.isnan()).sum(dim=1)
    return next(most for most in range(1, values.shape[1] + 1) if int(n_heads.clamp(max=most).sum()) >= count)


def layer_bounds(per_layer: int | tuple[int | None, int | None] | None) -> tuple[int, float]:
    """
    The least and the most heads of one layer.

    Args:
        per_layer (`int` or `tuple[int, int]`, *optional*): The most, or the least and the most; None is no bound.

    Raises:
        `ValueError`: if the bounds admit no heads at all, or contradict each other.
    """
    pair = per_layer if isinstance(per_layer, (tuple, list)) else (None, per_layer)
    if len(pair) != 2 or not all(bound is None or is_index(bound) for bound in pair):
        raise ValueError(
            "`per_layer` must be 'even', the most heads a layer, or a pair (least, most), got "
            f"{shown(per_layer)}; bounds are integers."
        )
    least, most = pair[0] or 0, math.inf if pair[1] is None else pair[1]
    if least < 0 or most < 1 or least > most:
        raise ValueError(
            f"`per_layer` must be at least 1, or a pair (least, most) with 0 <= least <= most, got {per_layer}."
        )
    return least, most


@dataclass(frozen=True)
class Bounds:
    """
    How many heads may be chosen where.

    Args:
        least (`int`), most (`float`): For each row that has heads; of a row with fewer than `least`, all.
        per_group (`float`): The most of one key/value group.
        groups (`torch.Tensor`, *optional*): Shape (L, H), int64: the group of each head within its row; each head is a
            group of its own by default.
    """

    least: int = 0
    most: float = math.inf
    per_group: float = math.inf
    groups: torch.Tensor | None = None

    def group(self, cell: Cell) -> tuple[int, int]:
        """The row and the group of a cell."""
        return cell[0], cell[1] if self.groups is None else int(self.groups[cell])


def best_cells(values: torch.Tensor, count: int, bounds: Bounds, lowest: int = 0) -> list[Cell] | None:
    """
    The cells with the highest sum of scores that keep to the bounds; ties go to the lower row, then the lower head.

    Taking the best `least` of each row first and then the best of what is left gives the highest sum: what the bounds
    allow is a matroid, as groups lie within rows.

    Args:
        values (`torch.Tensor`): Shape (L, H); NaN where there is no head.
        count (`int`): How many to take.
        bounds (`Bounds`): The bounds.
        lowest (`int`): Rows below are left out, and `least` does not hold for them.

    Returns:
        `list[tuple[int, int]]`: the cells, or None where no choice keeps to the bounds.
    """
    there = [(row, head) for row, head in (~values.isnan()).nonzero().tolist() if row >= lowest]
    # stable: cells of equal scores stay in order
    ranked = sorted(there, key=lambda cell: -float(values[cell]))
    used: dict[int, int] = {}
    used_of_group: dict[tuple[int, int], int] = {}
    chosen: list[Cell] = []
    for bound, stop in ((bounds.least, len(ranked)), (bounds.most, count)):
        taken = set(chosen)
        for cell in ranked:
            group = bounds.group(cell)
            if (
                cell not in taken
                and len(chosen) < stop
                and used.get(cell[0], 0) < bound
                and used_of_group.get(group, 0) < bounds.per_group
            ):
                chosen.append(cell)
                used[cell[0]] = used.get(cell[0], 0) + 1
                used_of_group[group] = used_of_group.get(group, 0) + 1
    return chosen if len(chosen) == count else None


def best_for_the_time(values: torch.Tensor, count: int, bounds: Bounds) -> list[Cell] | None:
    """
    The cells for which the sum of scores divided by the time of a training step is highest.

    The backward pass ends at the lowest chosen layer `l`, so the step takes `1 + (L - l) / L` forward passes. For each
    `l` the best cells from there up are compared; of equals, those that cost less time win.

    Args:
        values (`torch.Tensor`): As in [`best_cells`], at least 0.
        count (`int`), bounds (`Bounds`): As there.

    Returns:
        `list[tuple[int, int]]`: the cells, or None where no choice keeps to the bounds.
    """
    n_layers = len(values)
    best, best_value = None, -math.inf
    for lowest in reversed(range(n_layers)):
        cells = best_cells(values, count, bounds, lowest)
        if cells is None:
            continue
        value = sum(float(values[cell]) for cell in cells) / (1 + (n_layers - lowest) / n_layers)
        if value > best_value:
            best, best_value = cells, value
    return best
