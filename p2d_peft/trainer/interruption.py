"""What a run that was interrupted says: what is kept of it, and how to go on."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .choosing import scores_folder


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)


class _LastCheckpoint(TrainerCallback):
    """
    Knows the last checkpoint of a training: others in its folder may be of another run.

    Args:
        path (`str`, *optional*): The one that it goes on from.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.path = str(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))


@contextmanager
def explained_interruption(trainer: P2DTrainer, resume_from_checkpoint: str | bool | None) -> Iterator[None]:
    """
    Context of a training: Ctrl-C ends it as ever, after a warning in one process of several.

    Args:
        trainer (`P2DTrainer`): The trainer.
        resume_from_checkpoint (`str` or `bool`, *optional*): What its `train` was given.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)
    last = _LastCheckpoint(str(resume_from_checkpoint) if resume_from_checkpoint else None)
    trainer.add_callback(last)
    try:
        yield
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            logger.warning("%s", _how_to_go_on(trainer, last.path))
        raise
    finally:
        trainer.remove_callback(last)


def _how_to_go_on(trainer: P2DTrainer, checkpoint: str | None) -> str:
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
    if checkpoint is not None:
        return (
            f"Interrupted while training. '{checkpoint}' is kept, with the chosen heads and rows: go on from there with "
            f"`train(resume_from_checkpoint={checkpoint!r})`, on the command line with "
            f"`--resume_from_checkpoint {shlex.quote(checkpoint)}`."
        )
    folder = scores_folder(trainer.args)
    kept = f"; the scores of the rows are, in '{folder}', so that choosing them again is quick" if folder else ""
    return f"Interrupted while training, before the first checkpoint (see `save_steps`): no weights are kept{kept}."
