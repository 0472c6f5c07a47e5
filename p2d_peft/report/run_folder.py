"""
A run's folder, read for the report.

The folder may come from anyone. Files are opened by their fixed names alone, nothing that stands in one of them names
another, and what is in them is checked before it is used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..files import read_json
from ..heads import HeadScores, HeadSet
from ..heads.hub import HEAD_SCORES_NAME
from ..printable import shown
from .curves import CurveChart, curve_charts
from .data_records import SAMPLES_NAME, SELECTION_NAME, SamplesRecord, SelectionRecord
from .records import Record
from .run_report import REPORT_NAME, P2DReport


TRAINER_STATE_NAME = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")

R = TypeVar("R", bound=Record)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """
    What a run left.

    Args:
        report ([`P2DReport`]): The report.
        heads ([`HeadSet`], *optional*): The chosen heads.
        scores ([`HeadScores`], *optional*): What they were chosen by.
        selection ([`SelectionRecord`], *optional*): The selection in numbers.
        samples ([`SamplesRecord`], *optional*): What quotes the data.
        curves (`list[CurveChart]`): The training's curves.
        weight_files (`dict[str, int]`): The files with what was trained, and their bytes.
        checkpoint (`tuple[str, int]`, *optional*): The last checkpoint and the bytes of all its files.
    """

    report: P2DReport
    heads: HeadSet | None = None
    scores: HeadScores | None = None
    selection: SelectionRecord | None = None
    samples: SamplesRecord | None = None
    curves: list[CurveChart] = field(default_factory=list)
    weight_files: dict[str, int] = field(default_factory=dict)
    checkpoint: tuple[str, int] | None = None

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """
        Read a run.

        Args:
            path (`str` or `Path`): The run's `output_dir`, or its `p2d_report.json`, in whose folder the rest is.

        Raises:
            `ValueError`: if there is no report, or a file is damaged or of another run; the message names it.
        """
        path = Path(path)
        report_path = path / REPORT_NAME if path.is_dir() else path
        if not report_path.is_file():
            raise ValueError(f"There is no '{report_path}'. P2DTrainer writes it at the end of a training.")
        report = P2DReport.load(report_path)
        folder = report_path.parent
        heads = None if report.heads is None else _heads(report, report_path)
        selection, samples = _data(folder, report)
        checkpoint = _last_checkpoint(folder)
        return cls(
            report=report,
            heads=heads,
            scores=None if heads is None else _scores(folder / HEAD_SCORES_NAME, report, heads),
            selection=selection,
            samples=samples,
            curves=_curves([folder, *([checkpoint] if checkpoint else [])]),
            weight_files=_weight_files(folder),
            checkpoint=None if checkpoint is None else (checkpoint.name, _size(checkpoint)),
        )


def _optional(record: type[R], path: Path) -> R | None:
    return record.load(path) if path.is_file() else None


def _data(folder: Path, report: P2DReport) -> tuple[SelectionRecord | None, SamplesRecord | None]:
    """What a run left of its data; nothing where a later run, which left no report, has written over it."""
    path = folder / SELECTION_NAME
    selection = _optional(SelectionRecord, path)
    samples = _optional(SamplesRecord, folder / SAMPLES_NAME)
    if selection is not None:
        theirs = (selection.scorer, selection.pool_rows, selection.kept_rows)
        if theirs != (report.scorer, report.pool_rows, report.selected_rows):
            logger.warning(
                "'%s' is not of the run that '%s' is of: it has %d of %d rows by %s. It is left out, with the samples.",
                path,
                REPORT_NAME,
                selection.kept_rows,
                selection.pool_rows,
                shown(selection.scorer),
            )
            return None, None
    return selection, samples


def _heads(report: P2DReport, path: Path) -> HeadSet:
    try:
        heads = HeadSet.from_layers(report.heads or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: `heads` is no set of heads. {error}") from error
    beyond = [
        (layer, head) for layer, head in heads if report.layer_heads and head >= report.layer_heads.get(str(layer), 0)
    ]
    if beyond:
        raise ValueError(f"'{path}' is damaged: `heads` holds {beyond[0]}, but `layer_heads` has no such head.")
    return heads


def _scores(path: Path, report: P2DReport, heads: HeadSet) -> HeadScores | None:
    # given heads were not chosen by scores, whatever lies beside them, and what a draw goes by says nothing of the heads
    if report.localize_method in (None, "random") or not path.is_file():
        return None
    try:
        scores = HeadScores.load(path)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged or no table of head scores: {error}") from error
    rows = {str(layer): row for layer, row in zip(scores.layers, (~scores.values.isnan()).tolist(), strict=True)}
    if not all(head < len(row := rows.get(str(layer), [])) and row[head] for layer, head in heads):
        raise ValueError(f"'{path}' is not of this run: it lacks heads that '{REPORT_NAME}' names. Move it away.")
    return scores


def _last_checkpoint(folder: Path) -> Path | None:
    numbers = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return numbers[max(numbers)] if numbers else None


def _curves(folders: list[Path]) -> list[CurveChart]:
    """From the first folder with a log: the run's own is complete, a checkpoint's ends where it was made."""
    for path in (folder / TRAINER_STATE_NAME for folder in folders):
        if path.is_file():
            state: Any = read_json(path)
            if not isinstance(state, Mapping):
                raise ValueError(f"'{path}' is not the state of a trainer.")
            return curve_charts(state.get("log_history"))
    return []


def _weight_files(folder: Path) -> dict[str, int]:
    """The weights that `save_model` wrote: in the folder, and of named adapters and the LoRA in folders in it."""
    found = sorted(
        path for pattern in ("*.safetensors", "*/adapter_model.safetensors") for path in folder.glob(pattern)
    )
    own = (path for path in found if path.is_file() and not _CHECKPOINT.fullmatch(path.parent.name))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in own}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
