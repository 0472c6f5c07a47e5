"""Scores from features: how near does a sample lie to the target?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from .samples import Samples
from .scoring import RowScores, ScoreRows, ScoringContext


def similarity_to_target(
    context: ScoringContext, features: Callable[[Samples], torch.Tensor], centred: bool
) -> ScoreRows:
    """
    Scoring by the cosine similarity of a sample's features with the mean of the target's.

    Args:
        context (`ScoringContext`): With a target.
        features (`Callable[[Samples], torch.Tensor]`): The features of samples: shape (n, d), float32, on the CPU.
        centred (`bool`): Whether the mean over the pool, as far as its sample tells, is subtracted from all features.

    Returns:
        `ScoreRows`: scores in [-1, 1]; `per_target` holds the cosine similarities with the target's samples one by one.
    """
    assert context.target is not None
    known: dict[int, torch.Tensor] = {}
    centre = torch.zeros(())
    if centred:
        assert context.sample is not None
        of_sample = features(context.sample)
        centre = of_sample.mean(dim=0)
        # no row is passed through the model twice
        known = dict(zip(context.sample.rows, of_sample, strict=True))
    target = features(context.target)
    mean = target.mean(dim=0) - centre
    each = functional.normalize(target - centre, dim=1)

    def score(samples: Samples) -> RowScores:
        new = [index for index, row in enumerate(samples.rows) if row not in known]
        context.progress(len(samples) - len(new), 0)
        found = torch.empty(len(samples), target.shape[1])
        if new:
            found[new] = features(samples.subset(new))
        for index, row in enumerate(samples.rows):
            if row in known:
                found[index] = known[row]
        found -= centre
        with torch.autocast("cpu", enabled=False):  # also where the model runs on the CPU in a lower precision
            per_target = functional.normalize(found, dim=1) @ each.T
        return RowScores(functional.cosine_similarity(found, mean[None], dim=1), per_target, found)

    return score
