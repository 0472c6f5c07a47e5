"""`Diverse`: good rows that are not all alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch.nn import functional

from ...argument_checks import check_number
from .policy import Policy, Ranking


# The rows that are looked at, as a multiple of those that are wanted: more of them cost memory and bring in worse rows.
CANDIDATES = 4


@dataclass(frozen=True)
class Diverse(Policy):
    """
    Picks rows one by one, each for its rank and against its likeness to the rows picked before: maximal marginal
    relevance (Carbonell & Goldstein, SIGIR 1998) in the scorer's own features.

    A row's worth is `(1 - weight) * rank - weight * likeness`. Its rank runs evenly from 1 for the best candidate down to
    0, instead of being its score, so that a weight means the same for every scorer and after every other policy. Its
    likeness is the highest cosine similarity of its features with those of a row picked before.

    The candidates are the best rows, 4 times as many as are wanted, or with a budget of tokens as many as fill it 4 times;
    their features are held in memory and cost a second pass through the model. All other rows keep their order behind
    them.

    Args:
        weight (`float`, *optional*, defaults to 0.5): In [0, 1]: 0 leaves the ranking as it is, 1 looks at nothing but
            likeness.

    Raises:
        `ValueError`: if `weight` is out of range.
    """

    weight: float = 0.5

    needs_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("weight", self.weight, "a number in [0, 1]")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"`weight` must be in [0, 1], got {self.weight}.")

    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        rows = iter(rows)
        candidates = _candidates(rows, ranking)
        if candidates:
            features = functional.normalize(ranking.features(candidates), dim=1).numpy()
            worth = (1 - self.weight) * np.linspace(1, 0, len(candidates))
            likeness = np.full(len(candidates), -1.0)
            for _ in candidates:
                # of equal ones the first, which is the better ranked
                best = int(np.argmax(worth - self.weight * likeness))
                yield candidates[best]
                worth[best] = -np.inf
                np.maximum(likeness, features @ features[best], out=likeness)
        yield from rows


def _candidates(rows: Iterator[int], ranking: Ranking) -> list[int]:
    """The first of some rows: a few times as many as will be kept."""
    found: list[int] = []
    n_tokens = 0
    for row in rows:
        found.append(row)
        n_tokens += int(ranking.n_tokens[row])
        if ranking.enough(len(found), n_tokens, CANDIDATES):
            break
    return found
