"""`RunEstimate`: what `P2DTrainer.estimate()` gives."""

from __future__ import annotations

from dataclasses import dataclass

from ..efficiency import alignment_efficiency_ratio


@dataclass(frozen=True, repr=False)
class RunEstimate:
    """
    A forecast of what a run will take. Printed, it is a table.

    Args:
        stage_seconds (`dict[str, float]`): Expected seconds of `localize`, `select` and `train`. A stage that will not
            be run is missing.
        train_relative_error (`float`, *optional*): Relative standard error of the training's seconds per token, as far as
            the timed steps differ. Of the other stages there is no such thing.
        reference_seconds (`float`, *optional*): Seconds of the reference; None if there will be none.
        reference_source (`str`, *optional*): `"given"`, `"measured"` or `"estimated"`.
        reference_relative_error (`float`, *optional*): Of an estimate, its relative standard error.
        stage_peak_memory (`dict[str, int]`): Peak of the memory in bytes while the stage's batches were run; with the
            longest rows of the pool for `train`, with those that came first for the others.
        peak_memory_kind (`str`): What that is the memory of, see [`~p2d_peft.memory.memory_kind`].
        epochs (`float`): Epochs of the training.
        pool_rows (`int`): Rows of the pool.
        selected_rows (`int`): Rows that will be kept.
        measured_seconds (`float`): What the forecast took.
    """

    stage_seconds: dict[str, float]
    train_relative_error: float | None
    reference_seconds: float | None
    reference_source: str | None
    reference_relative_error: float | None
    stage_peak_memory: dict[str, int]
    peak_memory_kind: str
    epochs: float
    pool_rows: int
    selected_rows: int
    measured_seconds: float

    @property
    def aer(self) -> float | None:
        """Expected Alignment Efficiency Ratio; None without a reference."""
        if self.reference_seconds is None:
            return None
        return alignment_efficiency_ratio(self.stage_seconds, self.reference_seconds)

    @property
    def speedup(self) -> float | None:
        """1 / AER."""
        return None if self.aer is None else 1 / self.aer

    def __repr__(self) -> str:
        lines = [f"{'stage':<10}{'seconds':>12}{'peak memory':>14}"]
        for stage, seconds in self.stage_seconds.items():
            error = self.train_relative_error if stage == "train" else None
            memory = f"{self.stage_peak_memory[stage] / 2**30:.2f} GiB"
            lines.append(f"{stage:<10}{seconds:>12.1f}{memory:>14}{_spread(error)}")
        lines.append(f"{'total':<10}{sum(self.stage_seconds.values()):>12.1f}")
        if self.reference_seconds is None:
            lines.append("reference  none, so there will be no AER")
        else:
            source = f"  {self.reference_source}{_spread(self.reference_relative_error)}"
            lines.append(f"{'reference':<10}{self.reference_seconds:>12.1f}{source}")
            lines.append(f"{'AER':<10}{self.aer:>12.3f}  a speed-up of {self.speedup:.1f}")
        lines.append(
            f"{self.selected_rows} of {self.pool_rows} rows, {self.epochs:g} epochs; memory of the "
            f"{self.peak_memory_kind}; forecast in {self.measured_seconds:.1f} s from a few batches"
        )
        return "\n".join(lines)


def _spread(relative_error: float | None) -> str:
    return "" if relative_error is None else f"  +- {relative_error:.0%}"
