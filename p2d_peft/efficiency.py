"""
What a run cost, stage by stage, and the one number for it: the Alignment Efficiency Ratio (AER).

`AER = (t_localize + t_select + t_train) / t_reference`, where the reference is full-parameter SFT on the whole pool with
the same epochs on the same hardware. Lower is better; `speedup = 1 / AER`. The definition charges everything that the
method does; it is ours, the paper's text was not available.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from .memory import PeakMemory
from .passed_tokens import passed_tokens
from .processes import of_all_processes, settle
from .step_times import MakeOptimizer, TrainingLoss, time_steps


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


@dataclass(frozen=True)
class StageCosts:
    """
    What the stages cost so far. A stage that was not run is missing.

    Args:
        seconds (`dict[str, float]`): Wall-clock seconds.
        tokens (`dict[str, int]`): Tokens that passed through the model, in all processes together, padding left out; a
            token that passes twice counts twice.
        peak_memory (`dict[str, int]`): The peak of the memory in bytes, of the process where it is highest; see
            [`~p2d_peft.memory.memory_kind`] for what that is.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def without(self, stage: Stage) -> StageCosts:
        """The costs of the other stages."""
        return StageCosts(
            *({name: value for name, value in part.items() if name != stage} for part in vars(self).values())
        )


@dataclass
class _Running:
    """A stage that is under way: when it began, the counter of its tokens and where that stood then."""

    started: float
    tokens: Callable[[], int] | None
    tokens_before: int
    memory: PeakMemory


class StageClock:
    """
    Adds up what the stages cost: wall-clock seconds, tokens, and the peak of the memory.

    At both ends of a stage the accelerator is synchronised and, where there are several processes, each waits for all
    of them: a stage is over when the last of them is through, and is charged until then.

    A stage may be entered several times, and may start from the costs of an earlier process (a resumed run).
    """

    def __init__(self) -> None:
        self._charged = StageCosts()
        self._running: dict[str, _Running] = {}
        self._is_paused = False

    @contextmanager
    def stage(
        self, name: Stage, model: nn.Module | None = None, tokens: Callable[[], int] | None = None
    ) -> Iterator[None]:
        """
        Context that is charged to a stage, also when it ends in an exception. Nobody waits for anyone then.

        Args:
            name (`str`): The stage.
            model (`nn.Module`, *optional*): The model whose forward passes are the stage's; their tokens are counted.
            tokens (`Callable[[], int]`, *optional*): In place of `model`, a count that someone else keeps: it gives the
                tokens so far, of all processes, and may start anywhere.
        """
        with passed_tokens(model) if model is not None else nullcontext(tokens) as count:
            settle()
            running = _Running(time.perf_counter(), count, count() if count else 0, PeakMemory())
            self._running[name] = running
            running.memory.resume()
            completed = False
            try:
                yield
                completed = True
            finally:
                settle(everyone=completed)
                costs = self.costs
                running.memory.pause()
                del self._running[name]
                if completed:
                    costs = _with_highest_peaks(costs)
                    if model is not None and count is not None:  # each process has counted its own
                        of_others = sum(of_all_processes(count())) - count()
                        costs = replace(costs, tokens={**costs.tokens, name: costs.tokens[name] + of_others})
                self._charged = costs

    @contextmanager
    def paused(self, everyone: bool = True) -> Iterator[None]:
        """
        Context that is charged to no stage, whatever stage is running.

        Args:
            everyone (`bool`, *optional*, defaults to `True`): Whether all processes come here, and wait for one another at
                both ends. With `False`, what only one of them does is not charged there.
        """
        if self._is_paused or not self._running:
            yield
            return
        settle(everyone)
        start = time.perf_counter()
        self._is_paused, completed = True, False
        for running in self._running.values():
            running.memory.pause()
        try:
            yield
            completed = True
        finally:
            settle(everyone=everyone and completed)
            self._is_paused = False
            pause = time.perf_counter() - start
            for running in self._running.values():
                running.started += pause
                running.memory.resume()

    def set(self, costs: StageCosts) -> None:
        """Start from the costs of an earlier run, in place of what was charged so far."""
        self._charged = costs

    def charge(self, name: Stage, seconds: float, tokens: int) -> None:
        """Add to a stage what an earlier run spent on it and this one takes over."""
        charged = self._charged
        self._charged = replace(
            charged,
            seconds={**charged.seconds, name: charged.seconds.get(name, 0.0) + seconds},
            tokens={**charged.tokens, name: charged.tokens.get(name, 0) + tokens},
        )

    @property
    def costs(self) -> StageCosts:
        """What this process knows of the costs so far, those of a running stage included."""
        seconds, tokens, peaks = (dict(part) for part in vars(self._charged).values())
        now = time.perf_counter()
        for name, running in self._running.items():
            seconds[name] = seconds.get(name, 0.0) + now - running.started
            peaks[name] = max(peaks.get(name, 0), running.memory.bytes)
            if running.tokens is not None:
                tokens[name] = tokens.get(name, 0) + running.tokens() - running.tokens_before
        return StageCosts(_in_order(seconds), _in_order(tokens), _in_order(peaks))

    def costs_of_all(self) -> StageCosts:
        """The costs so far once each process has come this far; all of them have to call it."""
        settle()
        return _with_highest_peaks(self.costs)


def _in_order(part: dict[str, Any]) -> dict[str, Any]:
    return {stage: part[stage] for stage in STAGES if stage in part}


def _with_highest_peaks(costs: StageCosts) -> StageCosts:
    peaks = of_all_processes(costs.peak_memory)
    return replace(costs, peak_memory={stage: max(peak[stage] for peak in peaks) for stage in costs.peak_memory})


@dataclass(frozen=True)
class Reference:
    """
    Time of full-parameter SFT on the whole pool.

    Args:
        seconds_per_epoch (`float`): Seconds of one epoch.
        source (`str`): `"given"` by the user in seconds, `"measured"` in a run that left a report, or `"estimated"`
            from a few steps.
        relative_error (`float`, *optional*): Of an estimate, the standard error of its seconds per token, relative.
    """

    seconds_per_epoch: float
    source: Literal["given", "measured", "estimated"]
    relative_error: float | None = None


def estimate_reference(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    training_loss: TrainingLoss,
    make_optimizer: MakeOptimizer,
    pool_tokens: float,
    steps_per_epoch: float,
) -> Reference:
    """
    Estimate the reference from a few real steps of full fine-tuning; the model is put back bit for bit.

    An epoch is charged with `pool_tokens` at the measured seconds a token of forward and backward passes, and with
    `steps_per_epoch` optimizer steps.

    Args:
        model (`nn.Module`): The model, with floating-point weights.
        batches, training_loss, make_optimizer: As in [`time_steps`]; all weights are trained.
        pool_tokens (`float`): Tokens of the whole pool that this process would train on, padding not counted.
        steps_per_epoch (`float`): Optimizer steps of an epoch over the whole pool.

    Raises:
        `ValueError`: if the weights are quantized, or there are fewer than two batches.
    """
    parameters = list(model.parameters())
    if not all(parameter.is_floating_point() for parameter in parameters):
        raise ValueError("Full fine-tuning of quantized weights cannot be timed; give the reference instead.")
    times = time_steps(parameters, batches, training_loss, make_optimizer)
    return Reference(times.seconds(pool_tokens, steps_per_epoch), "estimated", times.relative_error)
