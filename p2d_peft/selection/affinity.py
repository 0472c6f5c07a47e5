"""The `affinity` scorer: do the selected heads do the same on a sample as on the target?"""

from __future__ import annotations

import torch
from torch.nn import functional

from .head_outputs import captured_head_outputs
from .samples import Samples
from .scoring import Scorer, ScoringContext


def affinity(context: ScoringContext) -> torch.Tensor:
    """
    Cosine similarity of a sample's pooled head outputs with the target's, both centred on the pool's mean.

    A sample's features are the outputs of the selected heads, each the mean over the positions that predict a token
    that counts, scaled to unit length head by head so that no loud head drowns the others. The target's features are
    the mean over its samples. One forward pass over pool and target, which ends in the deepest selected layer. The
    method is ours; it puts the paper's idea (the heads that the task moves judge the data, section 3.2.2) at the price
    of less than one forward pass.

    Returns:
        `torch.Tensor`: shape (pool,), float32, in [-1, 1].
    """
    assert context.heads is not None and context.target is not None
    pool = _features(context, context.pool, "Scoring pool (affinity)")
    target = _features(context, context.target, "Reading target (affinity)").mean(dim=0)
    centre = pool.mean(dim=0)
    return functional.cosine_similarity(pool - centre, (target - centre)[None], dim=1)


def _features(context: ScoringContext, samples: Samples, desc: str) -> torch.Tensor:
    """Shape (samples, heads * D), float32, on the CPU."""
    assert context.heads is not None
    features: torch.Tensor | None = None
    with captured_head_outputs(context.model, context.heads) as head_outputs:
        for indices, batch in samples.batches(context.batch_size, context.device, desc):
            labels = batch.pop("labels")
            outputs_BTHD = head_outputs(batch).float()
            predicts_BT = functional.pad(labels[:, 1:] != -100, (0, 1)).to(outputs_BTHD)
            with torch.autocast(context.device.type, enabled=False):  # sums of many tokens want their digits
                pooled_BHD = torch.einsum("bthd,bt->bhd", outputs_BTHD, predicts_BT)
            pooled = functional.normalize(pooled_BHD, dim=-1).flatten(1).cpu()
            if features is None:
                features = torch.empty(len(samples), pooled.shape[1])
            features[indices] = pooled
    assert features is not None
    return features


SCORER = Scorer(affinity, needs_heads=True, needs_target=True)
