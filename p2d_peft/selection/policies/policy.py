"""What a policy is, and what it gets to see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset

from ..samples import Samples


@dataclass(frozen=True)
class Ranking:
    """
    The scored rows of a pool, for policies to look at.

    Args:
        scores (`torch.Tensor`): Shape (rows of the pool,), float64; NaN for rows that cannot be taken.
        n_tokens (`torch.Tensor`): Shape (rows of the pool,), int64: the length of each row in tokens, after truncation.
        wanted (`int`): How many rows will be kept; with a budget of tokens, how many can be at most: so many of the pool's
            shortest rows fit into it.
        seed (`int`): For what is random in a policy.
        column (`Callable[[str], list[Any]]`): The values of one of the pool's columns, in all rows.
        samples (`Callable[[Sequence[int]], Samples]`): Some rows as tokens, in ascending order of the rows. A stream is
            read again for each call.
        features (`Callable[[Sequence[int]], torch.Tensor]`): The features of some rows by the scorer: shape (n, d),
            float32, in the order asked for. Costs a pass through the model.
        per_target (`torch.Tensor`, *optional*): Shape (rows of the pool, target's samples), float32: the scores for each
            of the target's samples alone. Only where a policy has `needs_per_target`.
        max_tokens (`int`, *optional*): The budget of tokens, if there is one.
    """

    scores: torch.Tensor
    n_tokens: torch.Tensor
    wanted: int
    seed: int
    column: Callable[[str], list[Any]]
    samples: Callable[[Sequence[int]], Samples]
    features: Callable[[Sequence[int]], torch.Tensor]
    per_target: torch.Tensor | None = None
    max_tokens: int | None = None

    def most(self, rows: list[int]) -> int:
        """How many of some rows can be kept at most."""
        if self.max_tokens is None:
            return min(self.wanted, len(rows))
        return most_fitting(self.n_tokens[rows], self.max_tokens)

    def enough(self, n_rows: int, n_tokens: int, times: int = 1) -> bool:
        """Whether so many rows with so many tokens together are as much as is wanted, or `times` as much."""
        if self.max_tokens is None:
            return n_rows >= times * self.wanted
        return n_tokens >= times * self.max_tokens


def most_fitting(lengths: torch.Tensor, max_tokens: int) -> int:
    """How many rows of given lengths fit into a budget of tokens at most."""
    return int((lengths.sort().values.cumsum(0) <= max_tokens).sum())


class Policy(ABC):
    """
    A policy drops rows from a ranking or brings them into another order. Several are applied one after the other; what
    stands first in the end is kept.

    Rankings are iterators, so that each row is looked at only once it is asked for: a costly policy works on as many
    rows as those behind it need, whatever they are, and not on the whole pool.

    Attributes:
        needs_per_target (`bool`): Whether `Ranking.per_target` has to be there, which only scorers with a target's
            samples can give.
        needs_features (`bool`): Whether `Ranking.features` will be asked for, which not all scorers have.
    """

    needs_per_target: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    def check(self, pool: Dataset | IterableDataset) -> None:  # noqa: B027
        """
        Look at a pool before its rows are scored, which may take hours; by default there is nothing to look at. A
        stream's rows are not to be read for it.

        Raises:
            `ValueError`: if the policy cannot do with it.
        """

    @abstractmethod
    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        """
        Args:
            rows (`Iterable[int]`): Rows of the pool, the best first.
            ranking (`Ranking`): What is known of them.

        Returns:
            `Iterator[int]`: some or all of them, the best first.
        """
