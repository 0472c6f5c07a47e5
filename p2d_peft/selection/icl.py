"""The `icl` scorer, the paper's: how much do the selected heads look at a sample when it is a demonstration?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.utils.logging import tqdm

from .attention import Observer, observable_attention
from .samples import Samples
from .scoring import Scorer, ScoringContext


# Ours: the paper's text was not available; Data Whisperer's order of magnitude.
N_DEMONSTRATIONS = 8
N_QUERIES = 4


def icl(context: ScoringContext) -> torch.Tensor:
    """
    In-context-learning score (P2D section 3.2.2, after Data Whisperer, arXiv 2505.12212, with the selected heads in
    place of all heads of one layer).

    The pool is shuffled and cut into groups of 8 demonstrations. Each group is put before 4 queries, samples of the
    target, one at a time. A demonstration earns, averaged over the queries, the quality of the query's answer times
    the attention that the selected heads pay from the answer to the demonstration, divided by its length in tokens.
    The quality is the geometric mean probability of the answer's tokens, `exp(mean log-likelihood)`. "From the answer"
    means from the positions that predict its tokens.

    The demonstrations' keys and values are computed once a group and shared by its queries.

    Returns:
        `torch.Tensor`: shape (pool,), float32, at least 0.
    """
    assert context.heads is not None and context.target is not None
    pool, target = context.pool, context.target
    generator = torch.Generator().manual_seed(context.seed)
    order = torch.randperm(len(pool), generator=generator).tolist()
    queries = torch.randperm(len(target), generator=generator).tolist()
    scores = torch.zeros(len(pool))
    with (
        observable_attention(context.model, context.heads) as observed,
        tqdm(total=len(pool), desc="Scoring pool (icl)", unit="row") as progress,
    ):
        for start in range(0, len(order), N_DEMONSTRATIONS):
            group = order[start : start + N_DEMONSTRATIONS]
            # the target's samples take turns, so that all of them are asked
            turn = start // N_DEMONSTRATIONS * N_QUERIES
            asked = [queries[(turn + i) % len(queries)] for i in range(min(N_QUERIES, len(queries)))]
            scores[group] = _score_group(context, group, asked, observed)
            progress.update(len(group))
    return scores


def _score_group(
    context: ScoringContext,
    group: list[int],
    asked: list[int],
    observed: Callable[[int, Observer], AbstractContextManager[None]],
) -> torch.Tensor:
    """The scores of one group of demonstrations, shape (len(group),)."""
    assert context.target is not None
    model, device = context.model, context.device
    lengths = [len(context.pool.input_ids[i]) for i in group]
    prompt = torch.tensor([[token for i in group for token in context.pool.input_ids[i]]], device=device)
    # A cache made without the model's config keeps all keys also in layers with a sliding window; the mask hides them.
    cache = DynamicCache()
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    questions = _subset(context.target, asked)
    total = torch.zeros(len(group))
    for _, batch in questions.batches(context.batch_size, device):
        n_queries, n_tokens = batch["input_ids"].shape
        shared = copy.deepcopy(cache)
        shared.batch_repeat_interleave(n_queries)
        predicts_BT = functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        attention_to_demonstrations: list[torch.Tensor] = []

        def add_up(layer: int, weights_BHTS: torch.Tensor) -> None:
            to_prompt = weights_BHTS[..., : prompt.shape[1]]
            by_demonstration = torch.stack([part.sum(-1) for part in to_prompt.split(lengths, dim=-1)], dim=-1)
            attention_to_demonstrations.append(by_demonstration)  # noqa: B023

        with observed(n_tokens, add_up):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=functional.pad(batch["attention_mask"], (prompt.shape[1], 0), value=1),
                past_key_values=shared,
                use_cache=True,
            ).logits
        losses = functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
        )
        n_answer = predicts_BT.sum(1)
        quality_B = torch.exp(-losses.sum(1) / n_answer)
        attention_BHTN = torch.cat(
            [part.to(device) for part in attention_to_demonstrations], dim=1
        )  # N demonstrations, H all selected heads
        with torch.autocast(device.type, enabled=False):
            paid_BN = torch.einsum("bhtn,bt->bn", attention_BHTN, predicts_BT.to(attention_BHTN))
        paid_BN /= attention_BHTN.shape[1] * n_answer[:, None]
        total += (quality_B[:, None] * paid_BN).sum(0).cpu() / torch.tensor(lengths)
    return total / len(asked)


def _subset(samples: Samples, indices: list[int]) -> Samples:
    return Samples(
        rows=[samples.rows[i] for i in indices],
        input_ids=[samples.input_ids[i] for i in indices],
        labels=[samples.labels[i] for i in indices],
        n_rows=samples.n_rows,
        pad_token_id=samples.pad_token_id,
    )


SCORER = Scorer(icl, needs_heads=True, needs_target=True)
