"""`LengthBetween`: rows that are neither too short nor too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...argument_checks import check_count
from .policy import Policy, Ranking


@dataclass(frozen=True)
class LengthBetween(Policy):
    """
    Drops rows that have fewer or more tokens. Rows count as they will be trained on, truncated to `max_length`.

    Args:
        least (`int`, *optional*): The fewest tokens that a row may have.
        most (`int`, *optional*): The most tokens that a row may have.

    Raises:
        `ValueError`: if none of them is given, one is below 1, or `least` exceeds `most`.
    """

    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if self.least is None and self.most is None:
            raise ValueError("`LengthBetween` needs `least` or `most`, or both.")
        for name, value in (("least", self.least), ("most", self.most)):
            if value is not None:
                check_count(name, value)
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"`least` must not exceed `most`, got {self.least} and {self.most}.")

    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        n_tokens = ranking.n_tokens.tolist()
        for row in rows:
            if (self.least is None or n_tokens[row] >= self.least) and (
                self.most is None or n_tokens[row] <= self.most
            ):
                yield row
