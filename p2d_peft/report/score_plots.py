"""Scores of rows, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_scores(scores: torch.Tensor, kept: Sequence[int], ax: Axes | None = None) -> Axes:
    """
    Draw a histogram of the scores of a pool's rows, with those of the kept rows in another colour and the lowest of them
    as a line: the cut, where nothing but the scores decided.

    Args:
        scores (`torch.Tensor`): Shape (rows,); NaN is left out.
        kept (`Sequence[int]`): The rows that were kept.
        ax (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure by default.

    Returns:
        `matplotlib.axes.Axes`: the axes with the histogram.

    Raises:
        `ImportError`: if matplotlib is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("`plot_scores` needs matplotlib: `pip install 'p2d_peft[plots]'`.") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    is_kept = torch.zeros(len(scores), dtype=torch.bool)
    is_kept[list(kept)] = True
    parts = [scores[~is_kept & ~scores.isnan()], scores[is_kept]]
    ax.hist(
        [part.tolist() for part in parts],
        bins=50,
        stacked=True,
        label=[f"left out ({len(parts[0])} rows)", f"kept ({len(parts[1])} rows)"],
    )
    if len(parts[1]):
        ax.axvline(float(parts[1].min()), color="black", linewidth=1, linestyle="--", label="lowest score kept")
    ax.set(xlabel="score", ylabel="rows")
    ax.legend()
    return ax
