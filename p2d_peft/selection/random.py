"""The `random` control: a seeded draw. A scorer that does not beat it is not worth its cost."""

from __future__ import annotations

import torch

from .scoring import Scorer, ScoringContext


def uniform(context: ScoringContext) -> torch.Tensor:
    """Independent uniform scores in [0, 1), shape (pool,), float64; the model is not run."""
    generator = torch.Generator().manual_seed(context.seed)
    return torch.rand(len(context.pool), generator=generator, dtype=torch.float64)


SCORER = Scorer(uniform, needs_heads=False, needs_target=False)
