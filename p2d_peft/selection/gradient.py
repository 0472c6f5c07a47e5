"""The `gradient` scorer: would training the selected heads on a sample move them as the target would?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..model_state import preserved_state
from .head_gradients import ProjectedGradient, head_gradients
from .scoring import Scorer, ScoreRows, ScoringContext
from .similarity import similarity_to_target


# What the rows and columns of each slice are projected to. Ours: with heads in 20 layers, 80 slices, that is 20,480
# numbers a sample, and cosines are off by 0.05 in the root mean square, where they vary by 0.21 (SmolLM2-135M-Instruct).
PROJECTED_ROWS = 16
PROJECTED_COLUMNS = 16


@contextmanager
def gradient(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Cosine similarity of a sample's gradient in the selected heads' weights with the target's, the mean over its samples
    (LESS, arXiv 2402.04333, narrowed to the heads: plain gradients of the model as it is, without LoRA, warm-up and
    Adam). The heads' weights are what training them would move: their rows of q, their groups' rows of k and v, their
    columns of o. The gradient is that of the mean loss over the sample's tokens that count.

    Gradients are projected at random as in LoGra (arXiv 2405.13954) before they are built; see [`ProjectedGradient`].
    One forward pass over pool and target, and a backward pass to the lowest selected head, which computes no gradients of
    weights and so works on quantized ones.

    Yields:
        `ScoreRows`: scores in [-1, 1], float32.
    """
    assert context.heads is not None
    projected = ProjectedGradient(PROJECTED_ROWS, PROJECTED_COLUMNS, context.seed)
    with preserved_state(context.model), head_gradients(context.model, context.heads, projected) as gradients_of:
        for parameter in context.model.parameters():
            parameter.requires_grad = False

        yield similarity_to_target(context, lambda samples: context.of_each(samples, gradients_of), centred=False)


SCORER = Scorer("gradient", gradient, needs_heads=True, needs_target=True, per_target=True, features=True)
