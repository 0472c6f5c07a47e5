"""The `icl` scorer, the paper's: how much do the selected heads look at a sample when it is a demonstration?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..heads.samples import head_on_counted
from .attention import Observer, observable_attention
from .losses import label_losses
from .samples import Samples, length_multiple
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


# Ours: the paper's text was not available; Data Whisperer's order of magnitude.
N_DEMONSTRATIONS = 8
N_QUERIES = 4
# tokens that a generated answer may have, for each of the right one's
_MOST_OF_ANSWER = 2


# (what the model answered, the right answer) -> how good that is, at least 0
Metric: TypeAlias = Callable[[str, str], float]


def icl_scorer(metric: Metric) -> Scorer:
    """
    The `icl` scorer with another quality: that of the answers that the model generates after the demonstrations, as in
    Data Whisperer, in place of the likelihood of the right ones.

    It costs many times as much: each answer is generated token by token, behind all demonstrations.

    Args:
        metric (`Callable[[str, str], float]`): From the generated answer and the right one, both without special tokens
            and without white space around them, to a number of at least 0, the higher the better.

    Returns:
        [`Scorer`]: to be passed to [`P2DDataSelector`] as `scorer`.

    Example:

    ```python
    >>> from p2d_peft.selection import icl_scorer

    >>> scorer = icl_scorer(lambda answer, right: float(answer == right))
    ```
    """
    return Scorer(
        "icl", partial(icl, metric=metric), needs_heads=True, needs_target=True, options=metric, generates=True
    )


@contextmanager
def icl(context: ScoringContext, metric: Metric | None = None) -> Iterator[ScoreRows]:
    """
    In-context-learning score (P2D section 3.2.2, after Data Whisperer, arXiv 2505.12212, with the selected heads in
    place of all heads of one layer).

    The samples are shuffled and cut into groups of 8 demonstrations, or of fewer where so many and the target's longest
    sample are more tokens than the model has positions. Each group is put before 4 queries, samples of the
    target, one at a time. A demonstration earns, averaged over the queries, the quality of the query's answer times
    the attention that the selected heads pay from the answer to the demonstration, divided by its length in tokens.
    The quality is the geometric mean probability of the answer's tokens, `exp(mean log-likelihood)`, unless there is a
    metric (see [`icl_scorer`]). "From the answer" means from the positions that predict the right answer's tokens.

    The demonstrations' keys and values are computed once a group and shared by its queries.

    Yields:
        `ScoreRows`: scores of at least 0, float32.

    Raises:
        `ValueError`: if the model has layers of linear attention or of a state-space model. From the state that those
            keep instead of keys and values, transformers goes on with one token at a time only. Or if it has virtual
            tokens (prompt or prefix tuning), or a sample has no room beside the target's longest one.
    """
    assert context.heads is not None and context.target is not None
    target = context.target
    model = context.model
    if (
        isinstance(model, PeftModel)
        and model.active_peft_config.is_prompt_learning
        and model.has_active_enabled_adapter
    ):
        raise ValueError(
            f"`scorer`='icl' puts rows one behind another, but `model` has virtual tokens "
            f"({model.active_peft_config.peft_type.value}) before each input; use 'affinity', 'gradient' or 'influence', "
            "or score within `model.disable_adapter()`."
        )
    room = _room(context, target, generates=metric is not None)
    with _without_router_logits(context.model), observable_attention(context.model, context.heads) as observed:
        layers = DynamicCache(config=context.model.config).layers
        if stateful := [
            index for index, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)
        ]:
            raise ValueError(
                f"`scorer`='icl' needs attention in all layers, but layer {stateful[0]} of `model` "
                f"({type(context.model).__name__}) keeps a state in its place; use 'affinity', 'gradient' or 'influence'."
            )

        def score(samples: Samples) -> RowScores:
            generator = context.generator(samples)
            order = torch.randperm(len(samples), generator=generator).tolist()
            queries = torch.randperm(len(target), generator=generator).tolist()
            scores = torch.zeros(len(samples))
            for turn, group in enumerate(_groups(order, samples, room)):
                # the target's samples take turns, so that all of them are asked
                first = turn * N_QUERIES
                asked = [queries[(first + i) % len(queries)] for i in range(min(N_QUERIES, len(queries)))]
                demonstrations, questions = samples.subset(group), target.subset(asked)
                scores[group] = _score_group(context, demonstrations, questions, observed, metric)
                context.progress(len(group), demonstrations.n_tokens + questions.n_tokens)
            return RowScores(scores)

        yield score


def _text_config(model: nn.Module) -> Any:
    """The config of a model's language part; None of a model that has none."""
    config: Any = getattr(model, "config", None)
    return config and config.get_text_config()


@contextmanager
def _without_router_logits(model: nn.Module) -> Iterator[None]:
    """
    Context in which a mixture of experts makes no loss of its router's logits, as SFTTrainer has told it to: with a cache it
    does not get as many of them as the mask has tokens.
    """
    config = _text_config(model)
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


def _room(context: ScoringContext, target: Samples, *, generates: bool) -> float:
    """How many tokens there may be before a question, so that the model has a position for each one to the last."""
    positions = getattr(_text_config(context.model), "max_position_embeddings", None)
    if not positions:
        return math.inf
    longest = max(map(len, target.input_ids))
    longest += -longest % (length_multiple(context.device) or 1)
    if generates:
        counts = [[label != -100 for label in labels] for labels in target.labels]
        longest = max(longest, *(of_row.index(True) + _MOST_OF_ANSWER * sum(of_row) for of_row in counts))
    return int(positions) - longest


def _groups(order: list[int], samples: Samples, room: float) -> list[list[int]]:
    """The samples in their order, cut into groups of at most 8 and of no more tokens than there is room for."""
    lengths = [len(ids) for ids in samples.input_ids]
    if too_long := sorted(samples.rows[index] for index in order if lengths[index] > room):
        raise ValueError(
            f"`scorer`='icl' puts the target's samples behind those of the pool, and of the positions of `model` the longest "
            f"leaves {max(room, 0)}: too few for {len(too_long)} rows of the pool, first {too_long[0]} with "
            f"{lengths[samples.rows.index(too_long[0])]} tokens. Set a smaller `max_length` in `args`, or use 'affinity', "
            "'gradient' or 'influence'."
        )
    groups: list[list[int]] = []
    n_tokens = 0
    for index in order:
        if not groups or len(groups[-1]) == N_DEMONSTRATIONS or n_tokens + lengths[index] > room:
            groups.append([])
            n_tokens = 0
        groups[-1].append(index)
        n_tokens += lengths[index]
    return groups


def _score_group(
    context: ScoringContext,
    demonstrations: Samples,
    questions: Samples,
    observed: Callable[[int, Observer], AbstractContextManager[None]],
    metric: Metric | None,
) -> torch.Tensor:
    """The scores of one group of demonstrations, shape (len(demonstrations),)."""
    model, device = context.model, context.device
    lengths = [len(ids) for ids in demonstrations.input_ids]
    prompt = torch.tensor([[token for ids in demonstrations.input_ids for token in ids]], device=device)
    # A cache made without the model's config keeps all keys also in layers with a sliding window; the mask hides them.
    cache = DynamicCache()
    # Nobody reads the prompt's logits, and with a large vocabulary they take gigabytes; a model makes some, so those of one token.
    last = torch.zeros_like(prompt, dtype=torch.bool)
    last[:, -1] = True
    with head_on_counted(model, last):
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    total = torch.zeros(len(demonstrations))
    for indices, batch in questions.batches(context.batch_size, device):
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
        n_answer = predicts_BT.sum(1)
        if metric is None:
            quality_B = torch.exp(-label_losses(logits[:, :-1].float(), batch["labels"][:, 1:]))
        else:
            asked = questions.subset(indices)
            qualities = [metric(*pair) for pair in answers(context, demonstrations, asked)]
            quality_B = torch.tensor(qualities, dtype=torch.float32, device=n_answer.device)
        attention_BHTN = torch.cat(
            [part.to(device) for part in attention_to_demonstrations], dim=1
        )  # N demonstrations, H all selected heads
        with torch.autocast(device.type, enabled=False):
            paid_BN = torch.einsum("bhtn,bt->bn", attention_BHTN, predicts_BT.to(attention_BHTN))
        paid_BN /= attention_BHTN.shape[1] * n_answer[:, None]
        total += (quality_B[:, None] * paid_BN).sum(0).cpu() / torch.tensor(lengths)
    return total / len(questions)


def answers(context: ScoringContext, demonstrations: Samples, questions: Samples) -> list[tuple[str, str]]:
    """
    What the model answers to questions behind demonstrations, greedily, and the right answers.

    A question ends where its first token that counts begins. The model may say twice as much as the right answer has
    tokens.
    """
    before = [token for ids in demonstrations.input_ids for token in ids]
    pairs = []
    for input_ids, labels in zip(questions.input_ids, questions.labels, strict=True):
        right = [label for label in labels if label != -100]
        start = next(index for index, label in enumerate(labels) if label != -100)
        prompt = torch.tensor([before + input_ids[: max(start, 1)]], device=context.device)
        generated = context.model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_MOST_OF_ANSWER * len(right),
            do_sample=False,
            num_beams=1,
            pad_token_id=questions.pad_token_id,
        )
        texts = (generated[0, prompt.shape[1] :], right)
        answer, gold = (context.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts)
        pairs.append((answer, gold))
    return pairs


SCORER = Scorer("icl", icl, needs_heads=True, needs_target=True)
