"""What a model says of the answers' tokens, at no more than the answers' price: shared by the benchmarks that train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


Batch = dict[str, torch.Tensor]


def predictions(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits and labels from the first token that counts on; logits at `t` are for the label at `t`.

    A good part of the work is saved, and the numbers stay the same but for rounding: the prompts' logits are left out,
    as no loss looks at them, and what all rows begin with (the system's message, the task's instruction) passes
    through the model once, not once a row.
    """
    input_ids, labels = batch["input_ids"], batch["labels"]
    first = max(1, int((labels != -100).int().argmax(dim=1).min()))
    same = (input_ids == input_ids[:1]).all(dim=0)
    # the token that predicts the first label stays with its row
    shared = min(int(same.int().cumprod(dim=0).sum()), first - 1)
    cache = None
    if shared and len(input_ids) > 1:
        cache = model(input_ids=input_ids[:1, :shared], logits_to_keep=1, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(input_ids))
        input_ids = input_ids[:, shared:]
    logits = model(
        input_ids=input_ids,
        attention_mask=batch["attention_mask"],
        past_key_values=cache,
        logits_to_keep=labels.shape[1] - first + 1,
        use_cache=cache is not None,
    ).logits
    return logits[:, :-1].float(), labels[:, first:]


@torch.no_grad()
def judge_answers(
    model: nn.Module,
    batches: Iterable[Batch],
    eos: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    ends: Iterable[int] = (),
) -> dict[str, Any]:
    """
    NLL a token and exact match, over the answers' tokens up to and with the end token.

    Args:
        model (`nn.Module`): In eval mode.
        batches (`Iterable[Batch]`): `input_ids`, `attention_mask` and `labels` of shape (B, T).
        eos (`int`): The end token's id.
        autocast (`Callable`): Makes the context in which the model runs.
        ends (`Iterable[int]`, *optional*): Tokens that end an answer as well as the end token does: where that is asked
            for, each of them is right, and the NLL is that of their probabilities' sum.

    Returns:
        `dict`: `nll` (nats a token) and `exact_match` (share of rows), and as `right` whether each row's is exact, in
        the order of the batches.

    Raises:
        `ValueError`: for a row of which no token counts, as where its prompt alone is as long as rows may be.
    """
    nll, n_tokens = 0.0, 0
    right: list[bool] = []
    ending = torch.tensor(sorted({eos, *ends}))
    for batch in batches:
        if not (batch["labels"][:, 1:] != -100).any(dim=1).all():
            raise ValueError("a row has no answer's token: give it more room (max_length), or leave it out")
        with autocast():
            logits, labels = predictions(model, batch)
        counts = labels != -100
        # what a template puts behind the end token is never generated
        at_end = (labels == eos) & counts
        counts &= at_end.cumsum(dim=1) - at_end.int() == 0
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        found = logits.argmax(dim=-1)
        if len(ending) > 1:
            at_end &= counts
            of_ending = ending.to(labels.device)
            found = torch.where(at_end & torch.isin(found, of_ending), eos, found)
            losses[at_end] = logits[at_end].logsumexp(dim=-1) - logits[at_end][:, of_ending].logsumexp(dim=-1)
        nll += float(losses[counts].double().sum())
        n_tokens += int(counts.sum())
        # One pass gives the exact match of greedy decoding without decoding: its answer is the right one if and
        # only if at each of the answer's tokens, all before it being right, the most probable token is the right
        # one. That is what the argmax under teacher forcing says, by induction from the first token to the end.
        right += ((found == labels) | ~counts).all(dim=1).tolist()
    return {"nll": nll / n_tokens, "exact_match": sum(right) / len(right), "right": right}
