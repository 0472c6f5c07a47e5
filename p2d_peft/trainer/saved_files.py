"""
What a trainer saves beside what every trainer saves: the head map, its picture, and the adapter as LoRA.

A checkpoint, which training goes on from, gets the head map alone. Any other folder is a result to be used and shared. It
gets the picture and, of a HeadSparse adapter, an exact LoRA in `lora/`, so that whoever finds the adapter can use it
without this library. That costs about twice the adapter's own size (its weights again, and the zeros that put them in
their place), which is less than one checkpoint with its optimizer state.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub.constants import REPOCARD_NAME
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..heads import HeadScores, HeadSet, ModelGeometry
from ..heads.hub import HEAD_SCORES_NAME, HEADS_NAME
from ..report.head_map import save_head_map
from ..tuners.head_sparse import save_as_lora
from ..tuners.head_sparse.config import HEAD_SPARSE


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

PICTURE_NAME = "p2d_heads.png"


def save_beside_model(trainer: P2DTrainer, folder: Path, is_whole: bool) -> None:
    """
    Complete a folder that the trainer has just saved its model into.

    Args:
        trainer (`P2DTrainer`): The trainer, on a process that saves.
        folder (`Path`): The folder.
        is_whole (`bool`): Whether this process has the weights as a whole, not shards of them.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) is not None
    save_heads(folder, model, trainer.heads, trainer.head_scores, picture=not is_checkpoint)
    if is_checkpoint:
        # PEFT's draft of a card, with which the Hub refuses the checkpoint if it names a base model in a local folder
        (folder / REPOCARD_NAME).unlink(missing_ok=True)
    else:
        _save_lora(folder, model, is_whole)


def save_heads(
    folder: Path, model: Any, heads: HeadSet | None, scores: HeadScores | None, picture: bool = True
) -> None:
    """
    Save the head map: the chosen heads, the scores that they were chosen by, if there are any, and the picture of both,
    unless matplotlib is missing. What is there already is not touched: it may be on its way to the Hub.

    Args:
        folder (`Path`): Where to save. What an earlier run left there and this one lacks is removed.
        model (`nn.Module`): The model that the heads are of.
        heads ([`HeadSet`], *optional*): The heads.
        scores ([`HeadScores`], *optional*): The scores.
        picture (`bool`, *optional*, defaults to `True`): Whether to save the picture.
    """
    before = _contents(folder)
    if heads is None:
        (folder / HEADS_NAME).unlink(missing_ok=True)
    else:
        heads.save_pretrained(folder)
    if scores is None:
        (folder / HEAD_SCORES_NAME).unlink(missing_ok=True)
    else:
        scores.save(folder / HEAD_SCORES_NAME)
    path = folder / PICTURE_NAME
    if _contents(folder) != before:
        path.unlink(missing_ok=True)
    if picture and heads is not None and not path.is_file():
        drawn = scores is not None and scores.method == "random"  # by numbers that say nothing of the heads
        try:
            save_head_map(path, heads, ModelGeometry.of(model), None if drawn else scores)
        except ImportError as error:
            logger.info("There is no %s in '%s'. %s", PICTURE_NAME, folder, error)


def _contents(folder: Path) -> list[bytes | None]:
    paths = [folder / name for name in (HEADS_NAME, HEAD_SCORES_NAME)]
    return [path.read_bytes() if path.is_file() else None for path in paths]


def load_head_scores(folder: str | Path) -> HeadScores | None:
    """The scores that [`save_heads`] saved into a folder, if there were any."""
    path = Path(folder, HEAD_SCORES_NAME)
    return HeadScores.load(path) if path.is_file() else None


def is_head_sparse(model: Any) -> bool:
    """Whether a model's active adapter is a HeadSparse adapter."""
    return is_peft_model(model) and model.peft_config[model.active_adapter].peft_type == HEAD_SPARSE


def adapter_folder(model: Any) -> Path:
    """Where, relative to the folder that a `PeftModel` is saved into, PEFT puts its active adapter."""
    return Path("" if model.active_adapter == "default" else model.active_adapter)


def lora_folder(model: Any) -> Path:
    """Where, relative to that folder, the active adapter is put as LoRA."""
    return adapter_folder(model) / "lora"


def _save_lora(folder: Path, model: Any, is_whole: bool) -> None:
    if not is_head_sparse(model):
        return
    folder = folder / lora_folder(model)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (folder / name).unlink(missing_ok=True)  # of earlier weights
    if not is_whole:
        logger.info("No LoRA was saved, since the weights are sharded. Load the adapter and use `save_as_lora`.")
        return
    try:
        save_as_lora(model, folder, model.active_adapter)
    except ValueError as error:  # what it trains fits into no LoRA
        logger.info("No LoRA was saved. %s", error)
