"""
What a run writes down of its data: `p2d_selection.json`, numbers alone, and `_p2d_samples.json`, which quotes the data.

They are two files because of who may see them. Trainers upload their folder to the Hub, but nothing whose name begins with
an underscore: what quotes the data stays where the run was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .records import Record


SELECTION_NAME = "p2d_selection.json"
SAMPLES_NAME = "_p2d_samples.json"


@dataclass(frozen=True)
class Histogram:
    """
    How often values lie between each two edges, for the rows that were kept and for those that were not.

    Args:
        edges (`list[float]`): The n + 1 edges of n bins, ascending.
        kept (`list[int]`): Of the kept rows, how many are in each bin.
        left_out (`list[int]`): The same of the others.

    Raises:
        `ValueError`: if edges and counts do not belong together.
    """

    edges: list[float]
    kept: list[int]
    left_out: list[int]

    def __post_init__(self) -> None:
        n_bins = len(self.edges) - 1
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if n_bins < 1 or not ascending or len(self.kept) != n_bins or len(self.left_out) != n_bins:
            raise ValueError(
                f"a histogram needs ascending `edges` and one count less in `kept` and `left_out`, got {n_bins + 1}, "
                f"{len(self.kept)} and {len(self.left_out)}."
            )
        if min(self.kept + self.left_out) < 0:
            raise ValueError("a histogram's counts must be at least 0.")

    @property
    def totals(self) -> list[int]:
        """Of all rows, how many are in each bin."""
        return [kept + left_out for kept, left_out in zip(self.kept, self.left_out, strict=True)]

    def percentages(self) -> tuple[list[float], list[float]]:
        """The bins in percent: of all rows, and of the kept ones, each of its own total."""
        before, after = (
            [100 * count / max(sum(counts), 1) for count in counts] for counts in (self.totals, self.kept)
        )
        return before, after


@dataclass(frozen=True)
class SelectionRecord(Record):
    """
    The selection of a run in numbers.

    Args:
        scorer (`str`): What scored the rows.
        policies (`list[str]`): What else decided, by name and in order.
        pool_rows (`int`): Rows of the pool.
        kept_rows (`int`): Rows that were kept.
        unscored_rows (`int`): Rows without a token that counts, which got no score.
        cut (`float`): The lowest score of a kept row.
        passed_over (`int`): Rows that were left out with a score above the cut, as policies or a budget of tokens have it.
        scores (`Histogram`): Of the scores.
        lengths (`Histogram`): Of the rows' lengths in tokens, as they were scored.
    """

    format: ClassVar[str] = "p2d_peft.SelectionRecord"
    title: ClassVar[str] = "the record of a P2D selection"

    scorer: str
    policies: list[str]
    pool_rows: int
    kept_rows: int
    unscored_rows: int
    cut: float
    passed_over: int
    scores: Histogram
    lengths: Histogram


@dataclass(frozen=True)
class Group:
    """
    The rows that have one value in a column.

    Args:
        value (`str`, *optional*): The value; None for all values together that are not listed.
        pool_rows (`int`): How many there are in the pool.
        kept_rows (`int`): How many of them were kept.
    """

    value: str | None
    pool_rows: int
    kept_rows: int


@dataclass(frozen=True)
class Sample:
    """
    One row, to read.

    Args:
        row (`int`): Its number in the pool.
        score (`float`): Its score.
        kept (`bool`): Whether it was kept.
        n_tokens (`int`): Its length.
        text (`str`): What the model gets to see, or its beginning.
        shortened (`bool`): Whether there is more.
    """

    row: int
    score: float
    kept: bool
    n_tokens: int
    text: str
    shortened: bool


@dataclass(frozen=True)
class SamplesRecord(Record):
    """
    What quotes the data.

    Args:
        columns (`dict[str, list[Group]]`): For columns such as `source`, the rows by value, the most frequent first.
        best (`list[Sample]`): The rows with the highest scores, the highest first.
        worst (`list[Sample]`): The rows with the lowest scores, the lowest first.
    """

    format: ClassVar[str] = "p2d_peft.SamplesRecord"
    title: ClassVar[str] = "the samples of a P2D selection"

    columns: dict[str, list[Group]]
    best: list[Sample]
    worst: list[Sample]
