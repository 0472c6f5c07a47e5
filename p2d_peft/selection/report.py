"""What a selection tells beside the rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoringReport:
    """
    One scoring of a pool.

    Args:
        n_rows (`int`): Rows of the pool.
        uncounted_rows (`tuple[int, ...]`): Rows that got no score, as no token of them counts: empty, masked, or cut off
            before their completion.
        n_truncated (`int`): Rows that were longer than `max_length` and cut off.
        n_tokens (`int`): Tokens of the scored rows.
        n_resumed (`int`): Rows whose scores came from an earlier run.
        resumed_seconds (`float`): What these took then, of the process that took over most.
        resumed_tokens (`int`): Tokens that passed through the model for them then.
        seconds (`float`): Wall-clock time of this run, without `resumed_seconds`.
    """

    n_rows: int
    uncounted_rows: tuple[int, ...]
    n_truncated: int
    n_tokens: int
    n_resumed: int
    resumed_seconds: float
    resumed_tokens: int
    seconds: float


@dataclass(frozen=True)
class ScoringEstimate:
    """
    A forecast of what scoring a pool will take.

    Args:
        seconds (`float`): Wall-clock time on one process.
        n_rows (`int`): Rows of the pool.
        n_tokens (`int`): Tokens of the pool, as far as the measured rows tell.
        measured_rows (`int`): Rows that were scored for it, beside the pool's sample, which some scorers have to read
            first.
        measured_seconds (`float`): What the forecast took.
    """

    seconds: float
    n_rows: int
    n_tokens: int
    measured_rows: int
    measured_seconds: float
