"""Rows of a pool: in the order of their scores, by their numbers, and as what a selection returns."""

from __future__ import annotations

from itertools import islice

import torch
from datasets import Dataset, IterableDataset


SCORE_COLUMN = "p2d_score"


def ranked(scores: torch.Tensor) -> list[int]:
    """The rows that have a score, the best first; of equal ones the lower row number first."""
    order: list[int] = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True).tolist()
    n_scored = int((~scores.isnan()).sum())
    return order[:n_scored]


def rows_of(pool: Dataset | IterableDataset, rows: list[int]) -> Dataset:
    """Some rows of a pool, given in ascending order. A stream is read up to the last of them."""
    if isinstance(pool, Dataset):
        return pool.select(rows)
    wanted = set(rows)
    found = [row for index, row in enumerate(islice(pool, rows[-1] + 1 if rows else 0)) if index in wanted]
    return Dataset.from_list(found, features=pool.features)


def kept_rows(kept: Dataset, scores: list[float]) -> Dataset:
    """Rows with their scores in the column `p2d_score`, which replaces that of an earlier selection."""
    if SCORE_COLUMN in kept.column_names:
        kept = kept.remove_columns(SCORE_COLUMN)
    return kept.add_column(SCORE_COLUMN, scores)


def extremes(pool: Dataset, scores: torch.Tensor, n: int = 10) -> Dataset:
    """
    The rows with the highest and the lowest scores, to read.

    Args:
        pool (`Dataset`): The pool.
        scores (`torch.Tensor`): Shape (rows,), as [`P2DDataSelector.score`] returns them.
        n (`int`, *optional*, defaults to 10): How many of each; all rows once, if there are fewer than twice as many.

    Returns:
        `Dataset`: the rows from the best to the worst, with the columns `p2d_row` (their number) and `p2d_score`.
    """
    order = ranked(scores)
    chosen = order if len(order) <= 2 * n else order[:n] + order[-n:]
    shown = kept_rows(pool.select(chosen), scores[chosen].tolist())
    return shown.remove_columns([c for c in shown.column_names if c == "p2d_row"]).add_column("p2d_row", chosen)
