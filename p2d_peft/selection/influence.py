"""The `influence` scorer: how much harder does a sample get without the selected heads?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from ..heads import HeadSet, ModelGeometry
from ..heads.gates import gated
from .losses import losses_of
from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


# A sample that the model knows by heart has a loss of 0, and nothing can be said relative to that.
_LEAST_LOSS = 1e-6


def heads_off(model: nn.Module, heads: HeadSet) -> AbstractContextManager[None]:
    """
    Context in which heads put out nothing: their columns of the output projection's input are zero.

    Args:
        model (`nn.Module`): The model; hooks are on it only within the context.
        heads (`HeadSet`): The heads to switch off; all of them have to be there.
    """
    geometry = ModelGeometry.of(model)
    gates = {layer: torch.ones(1, geometry[layer].n_heads) for layer in heads.layers}
    for layer, head in heads:
        gates[layer][0, head] = 0
    return gated(model, geometry, gates)


@contextmanager
def influence(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Relative increase of a sample's loss when the selected heads are switched off, `(off - on) / on`
    (AttentionInfluence, arXiv 2505.07293, with the heads of the task in place of retrieval heads). Two forward passes.

    How a head is switched off is ours: what it puts out is zero, which needs no attention weights and so works with any
    attention implementation.

    Yields:
        `ScoreRows`: scores, float32; below 0 where the heads are in the way.
    """
    assert context.heads is not None
    heads = context.heads

    def score(samples: Samples) -> RowScores:
        on = losses_of(context, samples)
        with heads_off(context.model, heads):
            off = losses_of(context, samples)
        return RowScores((off - on) / on.clamp(min=_LEAST_LOSS))

    yield score


SCORER = Scorer("influence", influence, needs_heads=True, needs_target=False, passes=2)
