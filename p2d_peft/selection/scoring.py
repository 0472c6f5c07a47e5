"""What a scorer is: the one interface that the files of the scorers beside this one fill in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from ..heads import HeadSet
from .samples import Samples


@dataclass(frozen=True)
class ScoringContext:
    """
    What a scorer gets.

    Args:
        model (`nn.Module`): The model, in eval mode and without gradients; a scorer leaves it as it is.
        pool (`Samples`): The samples to score.
        target (`Samples`, *optional*): The samples of the task; None for scorers that need none.
        heads (`HeadSet`, *optional*): The selected heads; None for scorers that need none.
        batch_size (`int`): Samples a forward pass.
        seed (`int`): For all that is random.
        device (`torch.device`): Where the model takes its inputs.
    """

    model: nn.Module
    pool: Samples
    target: Samples | None
    heads: HeadSet | None
    batch_size: int
    seed: int
    device: torch.device


# returns a tensor of shape (len(context.pool),): the higher, the sooner a sample is taken
Score: TypeAlias = Callable[[ScoringContext], torch.Tensor]


@dataclass(frozen=True)
class Scorer:
    """A scorer and what it needs; `score` may count on getting it."""

    score: Score
    needs_heads: bool
    needs_target: bool
