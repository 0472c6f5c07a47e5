"""What a policy is, and what it gets to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..samples import Samples


@dataclass(frozen=True)
class Ranking:
    """
    The scored rows of a pool, for policies to look at.

    Args:
        scores (`torch.Tensor`): Shape (rows of the pool,), float64; NaN for rows that cannot be taken.
        n_tokens (`torch.Tensor`): Shape (rows of the pool,), int64: the length of each row in tokens, after truncation.
        wanted (`int`): How many rows will be kept; with a budget of tokens, how many rows of mean length fit into it.
        seed (`int`): For what is random in a policy.
        column (`Callable[[str, Sequence[int]], list[Any]]`): The values of one of the pool's columns in some rows.
        samples (`Callable[[Sequence[int]], Samples]`): Some rows as tokens, in ascending order of the rows.
        features (`Callable[[Sequence[int]], torch.Tensor]`): The features of some rows by the scorer: shape (n, d),
            float32, in the order asked for. Costs a pass through the model.
        per_target (`torch.Tensor`, *optional*): Shape (rows of the pool, target's samples), float32: the scores for each
            of the target's samples alone. Only where a policy has `needs_per_target`.
    """

    scores: torch.Tensor
    n_tokens: torch.Tensor
    wanted: int
    seed: int
    column: Callable[[str, Sequence[int]], list[Any]]
    samples: Callable[[Sequence[int]], Samples]
    features: Callable[[Sequence[int]], torch.Tensor]
    per_target: torch.Tensor | None = None


class Policy(Protocol):
    """
    A policy drops rows from a ranking or brings them into another order. Several are applied one after the other; what
    stands first in the end is kept.
    """

    @property
    def needs_per_target(self) -> bool:
        """Whether `Ranking.per_target` has to be there, which only scorers with a target's samples can give."""
        ...

    def __call__(self, rows: list[int], ranking: Ranking) -> list[int]:
        """
        Args:
            rows (`list[int]`): Rows of the pool, the best first.
            ranking (`Ranking`): What is known of them.

        Returns:
            `list[int]`: some or all of them, the best first.
        """
        ...
