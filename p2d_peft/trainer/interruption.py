"""What a run that was interrupted says: what is kept of it, and how to go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers.trainer_utils import get_last_checkpoint

from .choosing import scores_folder


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)


@contextmanager
def explained_interruption(trainer: P2DTrainer) -> Iterator[None]:
    """Context of a training: Ctrl-C ends it as ever, after a warning in one process of several."""
    try:
        yield
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            logger.warning("%s", _how_to_go_on(trainer))
        raise


def _how_to_go_on(trainer: P2DTrainer) -> str:
    if trainer._p2d_state is None:
        stage = (
            "localizing" if trainer.wants_heads and trainer.heads is None and not trainer.head_scores else "selecting"
        )
        kept = "The model is as it was."
        if trainer.head_scores is not None:
            kept += (
                " The scores of all heads are in `trainer.head_scores`; a new process finds them anew, and the same."
            )
        return f"Interrupted while {stage}. {kept} Start the same run again to go on from the scores of rows that are kept."
    checkpoint = get_last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        return (
            f"Interrupted while training. '{checkpoint}' is kept, with the chosen heads and rows: go on from there with "
            "`train(resume_from_checkpoint=True)`, on the command line with `--resume_from_checkpoint`."
        )
    folder = scores_folder(trainer.args)
    kept = f"; the scores of the rows are, in '{folder}', so that choosing them again is quick" if folder else ""
    return f"Interrupted while training, before the first checkpoint (see `save_steps`): no weights are kept{kept}."
