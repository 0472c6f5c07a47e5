"""The `affinity` scorer: do the selected heads do the same on a sample as on the target?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from .head_outputs import captured_head_outputs
from .scoring import Scorer, ScoreRows, ScoringContext
from .similarity import similarity_to_target


@contextmanager
def affinity(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Cosine similarity of a sample's pooled head outputs with the target's, both centred on the pool's mean.

    A sample's features are the outputs of the selected heads, each the mean over the positions that predict a token
    that counts, scaled to unit length head by head so that no loud head drowns the others. The target's features are
    the mean over its samples, the pool's mean is that of a sample of its rows. One forward pass over pool and target,
    which ends in the deepest selected layer. The method is ours; it puts the paper's idea (the heads that the task moves
    judge the data, section 3.2.2) at the price of less than one forward pass.

    Yields:
        `ScoreRows`: scores in [-1, 1], float32.
    """
    assert context.heads is not None
    with captured_head_outputs(context.model, context.heads) as head_outputs:

        def features(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            """Shape (B, heads * D), float32."""
            labels = batch.pop("labels")
            # without those of the virtual tokens that prompt tuning puts first
            outputs_BTHD = head_outputs(batch)[:, -labels.shape[1] :].float()
            predicts_BT = functional.pad(labels[:, 1:] != -100, (0, 1)).to(outputs_BTHD)
            with torch.autocast(context.device.type, enabled=False):  # sums of many tokens want their digits
                # as a product of matrices: einsum would first copy the outputs into another order
                pooled = predicts_BT[:, None] @ outputs_BTHD.flatten(2)
            pooled_BHD = pooled[:, 0].unflatten(1, outputs_BTHD.shape[2:])
            return functional.normalize(pooled_BHD, dim=-1).flatten(1)

        yield similarity_to_target(context, lambda samples: context.of_each(samples, features), centred=True)


SCORER = Scorer(
    "affinity", affinity, needs_heads=True, needs_target=True, needs_sample=True, per_target=True, features=True
)
