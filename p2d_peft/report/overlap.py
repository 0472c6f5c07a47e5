"""How much the heads of two runs agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..heads.comparison import spearman
from .run_folder import Run


@dataclass(frozen=True)
class Overlap:
    """
    How much two runs' heads agree.

    Args:
        name (`str`): The other run's model.
        both, ours, theirs (`int`): Heads that both chose, and how many each chose.
        chance (`float`, *optional*): As many as two random choices of these sizes would have in common, on average.
        spearman (`float`, *optional*): Rank correlation of the scores, where both have some.
        same_model (`bool`): Whether both name the same model.
    """

    name: str
    both: int
    ours: int
    theirs: int
    chance: float | None
    spearman: float | None
    same_model: bool


def compare_heads(run: Run, other: Run) -> Overlap:
    """
    Compare the heads of two runs.

    Raises:
        `ValueError`: if one of them has no heads, or their models have unlike numbers of heads.
    """
    for which in (run, other):
        if which.heads is None:
            raise ValueError("Only runs that chose heads can be compared, and one of the two has none.")
    assert run.heads is not None and other.heads is not None
    mine, theirs = run.report, other.report
    shapes = [report.layer_heads or report.n_heads for report in (mine, theirs)]
    if mine.n_heads != theirs.n_heads or (mine.layer_heads and theirs.layer_heads and shapes[0] != shapes[1]):
        raise ValueError(
            f"The two runs are of models with unlike heads: {mine.n_heads} in '{mine.model}' and {theirs.n_heads} in "
            f"'{theirs.model}'. Compare runs of one model."
        )
    correlation = None
    if run.scores is not None and other.scores is not None and run.scores.layers == other.scores.layers:
        there = ~run.scores.values.isnan()
        if there.equal(~other.scores.values.isnan()):
            correlation = spearman(run.scores.values[there], other.scores.values[there])
    return Overlap(
        name=str(theirs.model),
        both=len(run.heads & other.heads),
        ours=len(run.heads),
        theirs=len(other.heads),
        chance=len(run.heads) * len(other.heads) / mine.n_heads if mine.n_heads else None,
        spearman=None if correlation is None or math.isnan(correlation) else correlation,
        same_model=mine.model == theirs.model,
    )
