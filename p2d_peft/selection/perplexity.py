"""The `perplexity` control: the samples that the model finds hardest, whatever the task."""

from __future__ import annotations

import torch
from torch.nn import functional

from .scoring import Scorer, ScoringContext


def perplexity(context: ScoringContext) -> torch.Tensor:
    """
    Log-perplexity of a sample: the mean negative log-likelihood of its tokens that count. The highest are taken first
    (Top-PPL in Yin & Rush, arXiv 2410.16208).

    Returns:
        `torch.Tensor`: shape (pool,), float32, nats a token.
    """
    scores = torch.empty(len(context.pool))
    for indices, batch in context.pool.batches(context.batch_size, context.device, "Scoring pool (perplexity)"):
        labels = batch.pop("labels")[:, 1:]
        logits = context.model(**batch, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        scores[indices] = (losses.sum(1) / (labels != -100).sum(1)).cpu()
    return scores


SCORER = Scorer(perplexity, needs_heads=False, needs_target=False)
