"""`RoundRobin`: each of the target's samples gets its say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from .policy import Policy, Ranking


@dataclass(frozen=True)
class RoundRobin(Policy):
    """
    The target's samples take turns in picking the row that is best for them and still there, as in RDS+ (Ivison et al.,
    arXiv 2503.01807). A mean over the target would leave its rarer kinds of samples without a row.

    Of equal rows the one with the lower number is picked. There are as many turns as rows can be kept; the others keep
    their order behind them. It has to know all rows before the first turn.
    """

    needs_per_target: ClassVar[bool] = True

    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        assert ranking.per_target is not None
        rows = list(rows)
        turns = ranking.most(rows)
        ascending = torch.tensor(sorted(rows), dtype=torch.int64)
        # a sample whose turn it is finds its row among its best `turns`, as no more than that are gone
        favourites = [
            # as numbers only where they are asked for: with a budget of tokens most of the turns may never come
            map(int, ascending[_best(of_target, turns)].numpy())
            for of_target in ranking.per_target[ascending].T
        ]
        taken: set[int] = set()
        for turn in range(turns):
            row = next(row for row in favourites[turn % len(favourites)] if row not in taken)
            taken.add(row)
            yield row
        yield from (row for row in rows if row not in taken)


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the highest values, the highest first; of equal ones the lower place first."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    least = values.topk(count).values[-1]
    # sorting only those that come into question: a pool of a million rows is searched by each sample of the target
    candidates = (values >= least).nonzero().flatten()
    return candidates[values[candidates].argsort(descending=True, stable=True)][:count]
