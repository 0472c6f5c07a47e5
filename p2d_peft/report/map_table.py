"""The head map as the page has it: a table of layers and heads, shaded by score, with the chosen ones marked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..heads import HeadScores, HeadSet
from .charts import number
from .run_folder import Run
from .run_report import P2DReport


# A table of more heads is no map: no model has them, and a browser does not like them.
MOST_CELLS = 20_000


@dataclass(frozen=True)
class Cell:
    """
    A head on the map.

    Args:
        score (`str`, *optional*): Its score.
        shade (`float`, *optional*): Where the score is between the lowest, 0, and the highest, 1.
        mark (`str`): Who chose it: `"chosen"`, `"other"`, `"both"` or `""`.
    """

    score: str | None
    shade: float | None
    mark: str

    @property
    def said(self) -> str:
        """The cell in words."""
        words = {"chosen": "chosen", "other": "chosen by the other run", "both": "chosen by both runs", "": ""}
        return ", ".join(filter(None, (self.score, words[self.mark]))) or "not chosen"


@dataclass(frozen=True)
class HeadMap:
    """
    The heads of a model, layers downwards.

    Args:
        rows (`list[tuple[str, list[Cell | None]]]`): For each layer its name and its heads; None where there is no head.
        width (`int`): Heads of the widest layer.
        low, high (`str`, *optional*): The lowest and the highest score.
        method (`str`, *optional*): What gave the scores.
        stacks (`bool`): Whether layers have long names, as those of encoder-decoders.
    """

    rows: list[tuple[str, list[Cell | None]]]
    width: int
    low: str | None
    high: str | None
    method: str | None
    stacks: bool


def map_table(run: Run, others: HeadSet | None = None) -> HeadMap | None:
    """
    The map of a run, or None where there are no heads, or the report does not tell how many there are.

    Args:
        run ([`Run`]): The run.
        others ([`HeadSet`], *optional*): The heads of another run, to be marked, too.
    """
    heads, scores = run.heads, run.scores
    if heads is None:
        return None
    table = _table(scores, run.report)
    if table is None:
        return None
    values = [value for row in table.values() for value in row if value is not None]
    low, high = (min(values), max(values)) if scores is not None else (0.0, 0.0)

    def cell(layer: Any, head: int, value: float | None) -> Cell | None:
        if value is None:
            return None
        ours, theirs = (layer, head) in heads, others is not None and (layer, head) in others
        mark = ("both" if ours else "other") if theirs else ("chosen" if ours else "")
        if scores is None:
            return Cell(None, None, mark)
        return Cell(number(value), round((value - low) / (high - low), 3) if high > low else 0.5, mark)

    return HeadMap(
        rows=[(str(layer), [cell(layer, head, v) for head, v in enumerate(row)]) for layer, row in table.items()],
        width=max(map(len, table.values())),
        low=None if scores is None else number(low),
        high=None if scores is None else number(high),
        method=None if scores is None else scores.method,
        stacks=any(isinstance(layer, str) for layer in table),
    )


def _table(scores: HeadScores | None, report: P2DReport) -> dict[Any, list[float | None]] | None:
    """For each layer a value for each head, None where there is none; 0 for all where there are no scores."""
    if scores is not None:
        if scores.values.numel() > MOST_CELLS:
            return None
        rows = ([None if math.isnan(value) else value for value in row] for row in scores.values.tolist())
        return dict(zip(scores.layers, rows, strict=True))
    layers = report.layer_heads
    if not layers or max(layers.values()) < 1 or sum(layers.values()) > MOST_CELLS:
        return None
    return {int(layer) if layer.isdecimal() else layer: [0.0] * max(n, 0) for layer, n in layers.items()}
