"""The `perplexity` control: the samples that the model finds hardest, whatever the task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .losses import losses_of
from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


@contextmanager
def perplexity(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Log-perplexity of a sample: the mean negative log-likelihood of its tokens that count. The highest are taken first
    (Top-PPL in Yin & Rush, arXiv 2410.16208).

    Yields:
        `ScoreRows`: scores in nats a token, float32.
    """

    def score(samples: Samples) -> RowScores:
        return RowScores(losses_of(context, samples))

    yield score


SCORER = Scorer("perplexity", perplexity, needs_heads=False, needs_target=False)
