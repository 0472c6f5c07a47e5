"""Scorers without a selector around them."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig

from p2d_peft.selection.samples import Samples, prepare_samples
from p2d_peft.selection.scoring import RowScores, Scorer, ScoringContext

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_tokenizer


def samples_of(dataset: Dataset | None = None) -> Samples:
    dataset = prompt_completion() if dataset is None else dataset
    return prepare_samples(dataset, tiny_tokenizer(), SFTConfig(bf16=False, report_to="none"))


def scored(scorer: Scorer, model: nn.Module, samples: Samples, batch_size: int = 8, **kwargs) -> RowScores:
    """What a scorer says of samples; `kwargs` go to its context."""
    known = {"sample": None, "target": None, "heads": None, "seed": 0, "device": torch.device("cpu")}
    context = ScoringContext(model=model, tokenizer=tiny_tokenizer(), batch_size=batch_size, **(known | kwargs))
    with torch.no_grad(), scorer.open(context) as score:
        return score(samples)
