"""`Quotas`: so much of this, so much of that."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset

from ...argument_checks import check_number, check_type
from ...printable import shown
from ..pool import check_column, column_of
from .policy import Policy, Ranking


logger = logging.getLogger(__name__)

# what the values that are not named go by; no column holds it
_OTHERS = object()


@dataclass(frozen=True)
class Quotas(Policy):
    """
    Brings rows into an order of which every beginning has given shares of a column's values, as nearly as possible: the
    next row is the best of the value that lacks most. So the shares hold whatever number of rows is kept.

    A value that runs out of rows leaves its place to the others, in proportion to their shares; a warning tells of it.
    One that has none to begin with is refused, but in a stream, whose values are read too late for it.
    Values that are not named have together what the named ones leave, or are dropped where those leave nothing.

    Args:
        column (`str`): A column of the pool, such as `"source"`.
        shares (`Mapping[Any, float]`): The share of each value, above 0; together at most 1.

    Raises:
        `ValueError`: if there are no shares, one is not above 0, or they are more than 1 together.

    Example:

    ```python
    >>> Quotas("source", {"math": 0.5, "code": 0.3})  # 0.2 for all other sources together
    ```
    """

    column: str
    shares: Mapping[Any, float]

    def __post_init__(self) -> None:
        check_type("shares", self.shares, (Mapping,), "a mapping from values to shares")
        if not self.shares:
            raise ValueError("`shares` must name at least one value, got none.")
        for value, share in self.shares.items():
            check_number("shares", share, "a mapping from values to shares above 0")
            if not (math.isfinite(share) and share > 0):
                raise ValueError(f"`shares` must be above 0, got {share} for {value!r}.")
        if self._left < 0:
            raise ValueError(f"`shares` must be at most 1 together, got {math.fsum(self.shares.values())}.")

    def check(self, pool: Dataset | IterableDataset) -> None:
        if not isinstance(pool, Dataset):
            check_column(pool, self.column)
            return
        values = column_of(pool, self.column)
        self._check(values)
        there = dict.fromkeys(values)
        if absent := [value for value in self.shares if value not in there]:
            feature = pool.features[self.column]
            labels = f" They stand for {shown(feature.names)}." if isinstance(feature, ClassLabel) else ""
            raise ValueError(
                f"`shares` names {shown(absent[0])}, but no row of `pool` has that in the column {self.column!r}. Its "
                f"values are {shown(list(there))}.{labels}"
            )

    def _check(self, values: Iterable[Any]) -> None:
        # the values and not the column's type, as one of mixed types may hold both
        if (bad := next((value for value in values if not isinstance(value, Hashable)), None)) is not None:
            raise ValueError(
                f"`column` must be one of single values, such as texts or numbers, but {self.column!r} holds a "
                f"{type(bad).__name__}: {shown(bad)}. Give `pool` a column made of it, with `pool.map(...)`."
            )

    @property
    def _left(self) -> float:
        """The share of what is not named."""
        left = 1 - math.fsum(self.shares.values())
        return 0.0 if abs(left) < 1e-9 else left

    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        values = ranking.column(self.column)
        self._check(values)  # of a stream only now
        # whole numbers in proportion to the shares: deficits are compared without rounding, in whatever order they come
        exact = {value: Fraction(share) for value, share in self.shares.items()}
        if self._left:
            exact[_OTHERS] = Fraction(self._left)
        unit = math.lcm(*(share.denominator for share in exact.values()))
        weights = {value: int(share * unit) for value, share in exact.items()}

        waiting: dict[Any, deque[tuple[int, int]]] = {value: deque() for value in weights}
        taken = dict.fromkeys(weights, 0)
        places = enumerate(rows)
        n_given = n_tokens = 0
        while weights:
            total, n_taken = sum(weights.values()), sum(taken[value] for value in weights)
            deficits = {value: weight * (n_taken + 1) - taken[value] * total for value, weight in weights.items()}
            largest = max(deficits.values())
            behind = [value for value in weights if deficits[value] == largest]
            for value in behind:
                while not waiting[value] and (found := next(places, None)) is not None:
                    group = values[found[1]] if values[found[1]] in exact else _OTHERS
                    if group in weights:
                        waiting[group].append(found)
            ready = [value for value in behind if waiting[value]]
            if not ready:
                for value in behind:
                    del weights[value]
                    if not ranking.enough(n_given, n_tokens):
                        name = "Other values" if value is _OTHERS else repr(value)
                        logger.warning(
                            "%s in column %r ran out after %d rows; what is missing comes from the other values.",
                            name,
                            self.column,
                            taken[value],
                        )
                continue
            # of values that lack as much the one whose row is ranked higher
            value = min(ready, key=lambda value: waiting[value][0])
            taken[value] += 1
            _, row = waiting[value].popleft()
            n_given += 1
            n_tokens += int(ranking.n_tokens[row])
            yield row
