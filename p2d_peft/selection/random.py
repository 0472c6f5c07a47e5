"""The `random` control: a seeded draw. A scorer that does not beat it is not worth its cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


@contextmanager
def uniform(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Independent uniform scores; the model is not run.

    Yields:
        `ScoreRows`: scores in [0, 1), float64.
    """

    def score(samples: Samples) -> RowScores:
        return RowScores(torch.rand(len(samples), generator=context.generator(samples), dtype=torch.float64))

    yield score


SCORER = Scorer("random", uniform, needs_heads=False, needs_target=False, passes=0)
