"""Format or skill: what else there is to ask of a model than the exact answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from answers import predictions
from torch import nn
from torch.nn import functional
from trl import SFTConfig

from p2d_peft.model_state import model_device
from p2d_peft.selection.samples import prepare_samples

from .problem import Row, as_dataset


SHOTS = 4

Autocast = Callable[[], AbstractContextManager[Any]]


def few_shot(rows: list[Row]) -> str:
    """The first rows with their answers, to be put before a question. An answer ends with a line break, see [`line_ends`]."""
    return "".join(f"{row['prompt']}{row['completion']}\n\n" for row in rows[:SHOTS])


def line_ends(tokenizer: Any) -> list[int]:
    """
    The tokens that begin with a line break: what a model ends its answer with that was shown answers by [`few_shot`]. It has
    seen no end token there, so that to ask for one would be to ask for another format than what it was shown.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if text.startswith("\n")]


@torch.no_grad()
def judge_options(
    model: nn.Module, rows: list[Row], tokenizer: Any, arguments: SFTConfig, autocast: Autocast
) -> dict[str, float]:
    """
    How often the right one of a row's options is the likeliest, by the sum of its tokens' log-likelihoods, and how often
    a guess would be right. Nothing for rows without options.
    """
    asked = [row for row in rows if row["options"]]
    if not asked:
        return {}
    n_right = 0
    for row in asked:
        spelled = [{"prompt": row["prompt"], "completion": f" {option.strip()}"} for option in row["options"]]
        samples = prepare_samples(as_dataset(spelled), tokenizer, arguments, name="options")
        ((order, batch),) = samples.batches(len(spelled), model_device(model))
        with autocast():
            logits, labels = predictions(model, batch)
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
        likeliest = row["options"][order[int(losses.argmin())]]
        n_right += likeliest.strip() == row["completion"].strip()
    return {
        "options_accuracy": n_right / len(asked),
        "options_guess": sum(1 / len(row["options"]) for row in asked) / len(asked),
    }


@torch.no_grad()
def judge_passages(
    model: nn.Module, passages: list[str], tokenizer: Any, max_length: int, autocast: Autocast, batch_size: int = 10
) -> float:
    """NLL a token of texts, in nats."""
    nll, n_tokens = 0.0, 0
    for start in range(0, len(passages), batch_size):
        texts = passages[start : start + batch_size]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=max_length
        ).to(model_device(model))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        with autocast():
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        nll += float(functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"))
        n_tokens += int((labels != -100).sum())
    return nll / n_tokens
