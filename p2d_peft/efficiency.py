"""
What a run cost, stage by stage, and the one number for it: the Alignment Efficiency Ratio (AER).

`AER = (t_localize + t_select + t_train) / t_reference`, where the reference is full-parameter SFT on the whole pool with
the same epochs on the same hardware. Lower is better; `speedup = 1 / AER`. The definition charges everything that the
method does; it is ours, the paper's text was not available.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


Stage = Literal["localize", "select", "train"]
STAGES: tuple[Stage, ...] = ("localize", "select", "train")


def alignment_efficiency_ratio(stage_seconds: Mapping[str, float], reference_seconds: float) -> float:
    """
    AER of a run.

    Args:
        stage_seconds (`Mapping[str, float]`): Seconds of the stages `localize`, `select` and `train`; a missing stage
            was not run and costs nothing.
        reference_seconds (`float`): Seconds of the reference.

    Raises:
        `ValueError`: if the reference is not positive or a stage is unknown or negative.
    """
    if not reference_seconds > 0:
        raise ValueError(f"`reference_seconds` must be positive, got {reference_seconds}.")
    for stage, seconds in stage_seconds.items():
        if stage not in STAGES or not seconds >= 0:
            raise ValueError(f"`stage_seconds` must hold seconds >= 0 for {STAGES}, got {stage!r}: {seconds}.")
    return sum(stage_seconds.values()) / reference_seconds


class StageClock:
    """
    Adds up the wall-clock seconds of the stages, with the accelerator synchronised at both ends of each.

    A stage may be entered several times, and may start from the seconds of an earlier process (a resumed run).
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: dict[str, float] = {}

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Context that charges its duration to a stage, also when it ends in an exception."""
        _synchronize()
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            self._seconds[name] = self.seconds[name]
            del self._running[name]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context that is charged to no stage, whatever stage is running."""
        _synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            _synchronize()
            pause = time.perf_counter() - start
            self._running = {name: started + pause for name, started in self._running.items()}

    def set(self, seconds: Mapping[str, float]) -> None:
        """Start from the seconds of an earlier run, in place of what was charged so far."""
        self._seconds = dict(seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far, those of a running stage included."""
        now = time.perf_counter()
        return {
            name: self._seconds.get(name, 0.0) + (now - self._running[name] if name in self._running else 0.0)
            for name in STAGES
            if name in self._seconds or name in self._running
        }


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@dataclass(frozen=True)
class Reference:
    """
    Time of full-parameter SFT on the whole pool.

    Args:
        seconds_per_epoch (`float`): Seconds of one epoch.
        source (`str`): `"given"` by the user, or `"estimated"` from a few steps.
        relative_error (`float`, *optional*): Of an estimate, the standard error of its seconds per token, relative.
    """

    seconds_per_epoch: float
    source: Literal["given", "estimated"]
    relative_error: float | None = None


def estimate_reference(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    training_loss: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    pool_tokens: int,
    steps_per_epoch: int,
) -> Reference:
    """
    Estimate the reference from a few real steps of full fine-tuning; the model is put back bit for bit.

    An epoch is charged with `pool_tokens` at the measured seconds a token of forward and backward passes, and with
    `steps_per_epoch` optimizer steps. The first batch warms up and is not counted.

    Args:
        model (`nn.Module`): The model, with floating-point weights.
        batches (`list[dict[str, torch.Tensor]]`): At least two batches with `input_ids` and `labels`, and either an
            `attention_mask` or no padding.
        training_loss (`Callable`): From a batch to the loss, as the training computes it.
        make_optimizer (`Callable`): From parameters to the optimizer that full fine-tuning would use.
        pool_tokens (`int`): Tokens of the whole pool, padding not counted.
        steps_per_epoch (`int`): Optimizer steps of an epoch over the whole pool.

    Raises:
        `ValueError`: if the weights are quantized, or there are fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"`batches` must hold at least 2 batches (one warms up), got {len(batches)}.")
    parameters = list(model.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        raise ValueError("Full fine-tuning of quantized weights cannot be timed; give the reference instead.")
    # On the CPU, so that the estimate needs no more accelerator memory than full fine-tuning itself.
    weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    pass_seconds: list[float] = []
    step_seconds: list[float] = []
    tokens: list[int] = []
    try:
        for parameter in parameters:
            parameter.requires_grad = True
            parameter.grad = None
        optimizer = make_optimizer(parameters)
        for batch in batches:
            _synchronize()
            start = time.perf_counter()
            training_loss(batch).backward()
            _synchronize()
            middle = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            _synchronize()
            pass_seconds.append(middle - start)
            step_seconds.append(time.perf_counter() - middle)
            tokens.append(
                int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
            )
    finally:
        with torch.no_grad():
            for parameter, weight, gradient, flag in zip(parameters, weights, gradients, flags, strict=True):
                parameter.copy_(weight)
                parameter.grad = gradient
                parameter.requires_grad = flag
    rates = [seconds / count for seconds, count in zip(pass_seconds[1:], tokens[1:], strict=True)]
    rate = sum(pass_seconds[1:]) / sum(tokens[1:])
    error = statistics.stdev(rates) / len(rates) ** 0.5 / rate if len(rates) > 1 else None
    seconds = rate * pool_tokens + statistics.mean(step_seconds[1:]) * steps_per_epoch
    return Reference(seconds, "estimated", error)
