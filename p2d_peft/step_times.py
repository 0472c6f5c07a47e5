"""What training steps take, measured on a few of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from .processes import settle


# from a batch to the loss, as a training computes it
TrainingLoss: TypeAlias = Callable[[dict[str, torch.Tensor]], torch.Tensor]
# from parameters to the optimizer that a training uses for them
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepTimes:
    """
    What training steps took.

    Args:
        pass_seconds (`list[float]`): Seconds of the forward and backward pass over each batch.
        step_seconds (`list[float]`): Seconds of the optimizer step after it.
        tokens (`list[int]`): Tokens of each batch, padding not counted.
    """

    pass_seconds: list[float]
    step_seconds: list[float]
    tokens: list[int]

    def seconds(self, tokens: float, steps: float) -> float:
        """Seconds of passes over so many tokens, and of so many optimizer steps."""
        rate = sum(self.pass_seconds) / sum(self.tokens)
        return rate * tokens + statistics.mean(self.step_seconds) * steps

    @property
    def relative_error(self) -> float | None:
        """The standard error of the seconds per token, relative; None from one batch."""
        rates = [seconds / count for seconds, count in zip(self.pass_seconds, self.tokens, strict=True)]
        if len(rates) < 2:
            return None
        return statistics.stdev(rates) / len(rates) ** 0.5 / (sum(self.pass_seconds) / sum(self.tokens))


def time_steps(
    parameters: list[nn.Parameter],
    batches: list[dict[str, torch.Tensor]],
    training_loss: TrainingLoss,
    make_optimizer: MakeOptimizer,
) -> StepTimes:
    """
    Time a few real training steps; the parameters are put back bit for bit.

    Args:
        parameters (`list[nn.Parameter]`): What is trained.
        batches (`list[dict[str, torch.Tensor]]`): At least two batches with `input_ids` and `labels`, and either an
            `attention_mask` or no padding. The first one warms up and is not counted.
        training_loss (`Callable`): From a batch to the loss, as the training computes it.
        make_optimizer (`Callable`): From parameters to the optimizer that the training would use.

    Raises:
        `ValueError`: if there are fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"`batches` must hold at least 2 batches (one warms up), got {len(batches)}.")
    # On the CPU, so that no more accelerator memory is needed than in the training itself.
    weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    times = StepTimes([], [], [])
    try:
        for parameter in parameters:
            parameter.requires_grad = True
            parameter.grad = None
        optimizer = make_optimizer(parameters)
        for number, batch in enumerate(batches):
            settle(everyone=False)
            start = time.perf_counter()
            training_loss(batch).backward()
            settle(everyone=False)
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            settle(everyone=False)
            end = time.perf_counter()
            if number > 0:
                times.pass_seconds.append(middle - start)
                times.step_seconds.append(end - middle)
                counted = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
                times.tokens.append(int(counted))
    finally:
        with torch.no_grad():
            for parameter, weight, gradient, flag in zip(parameters, weights, gradients, flags, strict=True):
                parameter.copy_(weight)
                parameter.grad = gradient
                parameter.requires_grad = flag
    return times
