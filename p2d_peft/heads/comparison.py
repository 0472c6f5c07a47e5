"""How much two tables of head scores agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """
    How much two tables of head scores agree, see [`HeadScores.compare`].

    Args:
        spearman (`float`): Spearman's rank correlation over all heads, in [-1, 1]; NaN if a table's scores are all equal.
        overlap (`float`): Share of the chosen heads that both tables choose, in [0, 1].
        chance (`float`): The overlap to expect of a choice at random: the chosen heads' share of all heads.
        k (`int`): How many heads were chosen of each table.
    """

    spearman: float
    overlap: float
    chance: float
    k: int


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """
    Spearman's rank correlation: the correlation of the ranks, equal values having the mean of their ranks.

    Args:
        a, b (`torch.Tensor`): Shape (n,).

    Returns:
        `float`: in [-1, 1]; NaN where all values of `a` or all of `b` are equal.
    """
    rank_a, rank_b = (_ranks(values) for values in (a, b))
    rank_a, rank_b = rank_a - rank_a.mean(), rank_b - rank_b.mean()
    return float((rank_a * rank_b).sum() / (rank_a.square().sum() * rank_b.square().sum()).sqrt())


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    # a value's ranks run from last - counts + 1 to last
    return (last - (counts - 1) / 2)[place]
