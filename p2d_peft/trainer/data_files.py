"""
What a trainer writes beside its report of the data: `p2d_selection.json` and `_p2d_samples.json`.

Both are written once the rows are chosen, when pool and scores are at hand, and are small whatever the pool's size.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value

from ..report.data_records import (
    SAMPLES_NAME,
    SELECTION_NAME,
    Group,
    Histogram,
    Sample,
    SamplesRecord,
    SelectionRecord,
)
from ..report.run_folder import TRAINER_STATE_NAME
from ..report.run_report import REPORT_NAME
from ..selection import P2DDataSelector
from ..selection.policies import Quotas
from ..selection.pool import SCORE_COLUMN, ranked
from .config import P2DConfig
from .measured_run import MeasuredRun


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

BINS = 40
# A column of more values is text or a key. Of a column with quotas, the others are put together.
MOST_VALUES = 20
# Characters of a sample's text, and of a column's value.
LONGEST_TEXT, LONGEST_VALUE = 2_000, 80


def remove_earlier_run(args: P2DConfig) -> None:
    """
    Remove what a run of the past left in `output_dir` for its report: were this run interrupted, it would be taken for
    the rest of this one. What it left as the reference of this run stays.
    """
    reference = None if args.reference_report is None else MeasuredRun.read(args.reference_report).path
    for name in (REPORT_NAME, TRAINER_STATE_NAME, SELECTION_NAME, SAMPLES_NAME):
        path = Path(args.output_dir, name)
        if path.is_file() and not (reference is not None and path.samefile(reference)):
            path.unlink()


def save_data_files(trainer: P2DTrainer, selector: P2DDataSelector, pool: Any) -> None:
    """
    Write both files into the trainer's `output_dir`, or warn if that cannot be: the choice is worth more. Of a stream
    there are numbers alone: it is not read again for this. With `report_samples=0` there are no others, either.

    Args:
        trainer (`P2DTrainer`): The trainer, on its main process.
        selector (`P2DDataSelector`): The selector after `select`.
        pool (`Dataset` or `IterableDataset`): The pool as tokens, with its other columns.
    """
    folder, count = Path(trainer.args.output_dir), trainer.args.report_samples
    try:
        selection_record(selector).save(folder / SELECTION_NAME)
        if isinstance(pool, Dataset) and count:
            samples_record(selector, pool, trainer._tokenizer, count).save(folder / SAMPLES_NAME)
    except OSError as error:
        logger.warning("What `p2d report` shows of the data is not there. %s", error)


def selection_record(selector: P2DDataSelector) -> SelectionRecord:
    """A selection in numbers."""
    scores, n_tokens, kept = _result(selector)
    scored = ~scores.isnan()
    cut = float(scores[kept].min())
    return SelectionRecord(
        scorer=selector.engine.scorer.name,
        policies=[type(policy).__name__ for policy in selector.policies],
        pool_rows=len(scores),
        kept_rows=int(kept.sum()),
        unscored_rows=int((~scored).sum()),
        cut=cut,
        passed_over=int((scores[~kept] > cut).sum()),
        scores=_histogram(scores, _score_edges(scores[scored]), kept, scored),
        lengths=_histogram(n_tokens, _length_edges(n_tokens[scored]), kept, scored),
    )


def _result(selector: P2DDataSelector) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, lengths, and which rows were kept; each of shape (rows,)."""
    scores, n_tokens, rows = selector.scores, selector.n_tokens, selector.rows
    assert scores is not None and n_tokens is not None and rows is not None
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[rows] = True
    return scores, n_tokens, kept


def _histogram(values: torch.Tensor, edges: np.ndarray, kept: torch.Tensor, scored: torch.Tensor) -> Histogram:
    counts = [np.histogram(values[rows].numpy(), edges)[0].tolist() for rows in (kept, scored & ~kept)]
    return Histogram(edges.astype(float).tolist(), *counts)


def _score_edges(scores: torch.Tensor) -> np.ndarray:
    low, high = float(scores.min()), float(scores.max())
    margin = 1e-6 * max(abs(low), abs(high), 1e-6)
    if high - low < margin:  # equal, or so alike that there are no numbers for edges between them
        low, high = low - margin, high + margin
    return np.linspace(low, high, BINS + 1)


def _length_edges(n_tokens: torch.Tensor) -> np.ndarray:
    """Edges that have as many whole numbers between each two of them: else bins would look fuller by turns."""
    low, high = int(n_tokens.min()), int(n_tokens.max())
    width = max(1, math.ceil((high + 1 - low) / BINS))
    return np.arange(low, high + width + 1, width)


def samples_record(selector: P2DDataSelector, pool: Dataset, tokenizer: Any, count: int) -> SamplesRecord:
    """
    What quotes the data of a selection.

    Args:
        selector (`P2DDataSelector`): The selector after `select`.
        pool (`Dataset`): The pool as tokens, with its other columns.
        tokenizer (`PreTrainedTokenizerBase`): What makes text of tokens.
        count (`int`): How many of the best and of the worst rows.
    """
    scores, n_tokens, kept = _result(selector)
    order = ranked(scores)
    n_best = min(count, (len(order) + 1) // 2)
    n_worst = min(count, len(order) - n_best)

    def sample(row: int) -> Sample:
        # A token has a character, as a rule; there is no need to decode a book.
        input_ids = pool[row]["input_ids"]
        text = tokenizer.decode(input_ids[:LONGEST_TEXT])
        return Sample(
            row=row,
            score=float(scores[row]),
            kept=bool(kept[row]),
            n_tokens=int(n_tokens[row]),
            text=text[:LONGEST_TEXT],
            shortened=len(text) > LONGEST_TEXT or len(input_ids) > LONGEST_TEXT,
        )

    quotas = [policy.column for policy in selector.policies if isinstance(policy, Quotas)]
    return SamplesRecord(
        columns=dict(_columns(pool, quotas, kept)),
        best=[sample(row) for row in order[:n_best]],
        worst=[sample(row) for row in order[::-1][:n_worst]],
    )


def _columns(pool: Dataset, quotas: list[str], kept: torch.Tensor) -> Iterable[tuple[str, list[Group]]]:
    """For the columns with quotas, and for others with a few values, the rows by value."""
    for name, feature in pool.features.items():
        is_kind = isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool")
        )
        if name == SCORE_COLUMN or not (is_kind or name in quotas):
            continue
        groups = _groups(pool.select_columns([name]).with_format(None), kept, name in quotas)
        if groups is not None:
            yield name, groups


def _groups(column: Dataset, kept: torch.Tensor, is_quota: bool) -> list[Group] | None:
    """The rows by value, the most frequent value first; None where there is no sense in it."""
    ((name, feature),) = column.features.items()
    in_pool, in_kept = Counter[Any](), Counter[Any]()
    first = 0
    for batch in column.iter(batch_size=10_000):
        values = batch[name]
        in_pool.update(values)
        of_batch = kept[first : first + len(values)].tolist()
        in_kept.update(value for value, is_kept in zip(values, of_batch, strict=True) if is_kept)
        first += len(values)
        if not is_quota and len(in_pool) > MOST_VALUES:
            return None
    if len(in_pool) < 2:
        return None
    listed = [value for value, _ in in_pool.most_common(MOST_VALUES)]
    groups = [Group(_shown(value, feature)[:LONGEST_VALUE], in_pool[value], in_kept[value]) for value in listed]
    if len(in_pool) > len(listed):
        rest = (sum(counts.values()) - sum(counts[value] for value in listed) for counts in (in_pool, in_kept))
        groups.append(Group(None, *rest))
    return groups


def _shown(value: Any, feature: Any) -> str:
    # -1 is what data sets have where a label is missing
    if isinstance(feature, ClassLabel) and value is not None and 0 <= value < feature.num_classes:
        value = feature.int2str(value)
    return str(value)
