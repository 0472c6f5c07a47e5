"""The scores of a whole pool: put together from its shards, and looked at."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from .pool import shortened
from .report import ScoringReport
from .shards import ScoredShard


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolScores:
    """
    The scores of a pool.

    Args:
        scores (`torch.Tensor`): Shape (rows,), float64; NaN for rows without a token that counts.
        n_tokens (`torch.Tensor`): Shape (rows,), int64: the length of each scored row, 0 for the others.
        per_target (`torch.Tensor`, *optional*): Shape (rows, target's samples), float32.
        report (`ScoringReport`): What there is to tell.
    """

    scores: torch.Tensor
    n_tokens: torch.Tensor
    per_target: torch.Tensor | None
    report: ScoringReport


def put_together(
    done: list[ScoredShard], scorer: str, max_length: int | None, resumed: list[list[ScoredShard]], seconds: float
) -> PoolScores:
    """
    Put the shards of a pool together, and look at what came out.

    Args:
        done (`list[ScoredShard]`): All shards, in order.
        scorer (`str`): The scorer's name, for messages.
        max_length (`int`, *optional*): What rows were cut off at, for messages.
        resumed (`list[list[ScoredShard]]`): Those of them, by process, that an earlier run scored.
        seconds (`float`): For the report.

    Raises:
        `ValueError`: if there are no rows, none has a token that counts, or a score is not finite; the rows are named.
    """
    scores = torch.cat([scored.scores for scored in done] or [torch.empty(0, dtype=torch.float64)])
    n_tokens = torch.cat([scored.n_tokens for scored in done] or [torch.empty(0, dtype=torch.int32)])
    parts = [scored.per_target for scored in done if scored.per_target is not None]
    n_targets = parts[0].shape[1] if parts else 0
    # a shard without a single token that counts has none
    per_target = (
        torch.cat(
            [
                scored.per_target
                if scored.per_target is not None
                else torch.full((len(scored.scores), n_targets), torch.nan)
                for scored in done
            ]
        )
        if parts
        else None
    )
    if not len(scores):
        raise ValueError("`pool` has no rows.")
    counted = n_tokens > 0
    report = ScoringReport(
        n_rows=len(scores),
        uncounted_rows=tuple((~counted).nonzero().flatten().tolist()),
        n_truncated=sum(scored.n_truncated for scored in done),
        n_tokens=int(n_tokens.sum()),
        n_resumed=sum(len(scored.scores) for of_process in resumed for scored in of_process),
        resumed_seconds=max(sum(scored.seconds for scored in of_process) for of_process in resumed),
        resumed_tokens=sum(scored.passed_tokens for of_process in resumed for scored in of_process),
        seconds=seconds,
    )
    if not counted.any():
        raise ValueError(nothing_counts("pool", max_length))
    if report.uncounted_rows:
        logger.warning(
            "%d of %d rows of the pool have no token that counts and will not be selected: rows %s.",
            len(report.uncounted_rows),
            len(scores),
            shortened(report.uncounted_rows),
        )
    if report.n_truncated:
        logger.info(
            "%d of %d rows of the pool were cut off at `max_length`=%s.",
            report.n_truncated,
            len(scores),
            max_length,
        )
    bad = (counted & ~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"`scorer`={scorer!r} gave no finite score to {len(bad)} of {len(scores)} rows of the pool: "
            f"rows {shortened(bad)}. The model's outputs are not finite on them."
        )
    values = scores[counted]
    if len(values) > 1 and bool((values == values[0]).all()):
        logger.warning(
            "`scorer`=%r gave all %d rows the same score, so it selects by row number.", scorer, len(values)
        )
    return PoolScores(scores, n_tokens.long(), per_target, report)


def nothing_counts(name: str, max_length: int | None) -> str:
    """The message for a dataset without a single token to learn from."""
    return (
        f"No row of `{name}` has a token that counts (a label other than -100); check its contents, "
        f"`max_length`={max_length} and the loss masks."
    )
