"""What a resumed run takes over of the choices that its checkpoint was made with, and what of its own arguments counts."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from trl import SFTConfig

from .arguments import changed
from .choosing import expected_epochs
from .config import P2DConfig
from .reference import find_reference
from .state import P2DState


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

# What bears on no choice: whether there are choices, what the cost is compared with, and what is shown.
_OTHERS = ("p2d", "reference_seconds", "reference_report", "reference_steps", "report_samples")


def choosing_arguments(args: P2DConfig) -> dict[str, Any]:
    """The arguments that heads and rows are chosen by."""
    of_sft = {field.name for field in dataclasses.fields(SFTConfig)}
    names = (field.name for field in dataclasses.fields(P2DConfig))
    return {name: getattr(args, name) for name in names if name not in of_sft and name not in _OTHERS}


def check_heads_and_reference(trainer: P2DTrainer, state: P2DState, checkpoint: str) -> None:
    """
    Check that a trainer which has chosen nothing can go on from a checkpoint's choices. A reference that it was given,
    measured in the meantime, say, takes the place of the checkpoint's.

    Raises:
        `ValueError`: if it was given other heads, or the report of a run on other rows as the reference.
    """
    if trainer.heads is not None and trainer.heads != state.heads:
        raise ValueError(
            f"The trainer was given the heads {trainer.heads!r}, but `resume_from_checkpoint`='{checkpoint}' has trained "
            f"{state.heads!r}. Give none, or start anew without `resume_from_checkpoint`."
        )
    args: P2DConfig = trainer.args
    if args.reference_seconds is not None or args.reference_report is not None:
        state.reference = find_reference(
            trainer, trainer.train_dataset, state.pool_rows, state.pool_tokens, expected_epochs(args, state)
        )


def with_those_of_the_choice(args: P2DConfig, state: P2DState, checkpoint: str) -> P2DConfig:
    """Arguments with those that a checkpoint's heads and rows were chosen by, after a warning where they were others."""
    here, there = choosing_arguments(args), state.arguments or {}
    others = {name: value for name, value in there.items() if name in here and here[name] != value}
    if not others:
        return args
    logger.warning(
        "The heads and rows of '%s' were chosen with other arguments than those given now, which do nothing: %s. For "
        "another choice start anew, without `resume_from_checkpoint`.",
        checkpoint,
        ", ".join(f"`{name}`={here[name]!r} (it was {value!r})" for name, value in others.items()),
    )
    return changed(args, **others)  # which the run's report then tells
