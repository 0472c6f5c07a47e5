"""The `length` control: the longest samples, whatever they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


@contextmanager
def length(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Number of a sample's tokens that count; the longest answers are taken first (Long Is More for Alignment,
    arXiv 2402.04833). The model is not run.

    Yields:
        `ScoreRows`: scores of at least 1, float64.
    """

    def score(samples: Samples) -> RowScores:
        # the first token is predicted from nothing, so it never counts
        counts = [sum(label != -100 for label in labels[1:]) for labels in samples.labels]
        return RowScores(torch.tensor(counts, dtype=torch.float64))

    yield score


SCORER = Scorer("length", length, needs_heads=False, needs_target=False, passes=0)
