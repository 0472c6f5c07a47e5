"""From a finished training to its `P2DReport` and its metrics."""

from __future__ import annotations

import dataclasses
import math
import re
from enum import Enum
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

from ..efficiency import Reference, StageCosts, alignment_efficiency_ratio
from ..heads import HeadSet, ModelGeometry
from ..memory import memory_kind
from ..model_state import model_id
from ..report import P2DReport
from .reference import count_tokens
from .saved_files import is_head_sparse
from .state import P2DState


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

# What of a run looks like a path and is none.
_WORDS = ("eos_token", "pad_token")
# Where results go, who may read them, and how the run is watched.
_NOT_OF_RESULT = re.compile(
    r"(output_dir|run_name|project|disable_tqdm|resume_from|local_rank|report_|log_|logging_|hub_|push_|trackio_)"
)


def make_report(trainer: P2DTrainer, state: P2DState | None, costs: StageCosts) -> P2DReport:
    """
    The record of a training run.

    Args:
        trainer (`P2DTrainer`): The trainer at the end of its training.
        state (`P2DState`, *optional*): The choices it was made with; None for a training on all rows, without P2D.
        costs (`StageCosts`): What the stages cost.
    """
    epochs = float(trainer.state.epoch or 0.0)
    reference = state.reference if state is not None else None
    reference_seconds = None if reference is None or epochs <= 0 else _seconds_of(reference, trainer, epochs)
    aer = None if reference_seconds is None else alignment_efficiency_ratio(costs.seconds, reference_seconds)
    model = trainer.accelerator.unwrap_model(trainer.model)
    # where no heads were needed, it may be a model whose heads are not known
    geometry = None if state is None or state.heads is None else ModelGeometry.of(model)
    pool_rows, pool_tokens = _size_of_all(trainer) if state is None else (state.pool_rows, state.pool_tokens)
    return P2DReport(
        stage_seconds=costs.seconds,
        stage_tokens=costs.tokens,
        stage_peak_memory=costs.peak_memory,
        peak_memory_kind=memory_kind(),
        device=trainer.args.device.type,
        processes=trainer.args.world_size,
        epochs=epochs,
        reference_seconds=reference_seconds,
        reference_source=reference.source if reference is not None else None,
        reference_relative_error=reference.relative_error if reference is not None else None,
        aer=aer,
        speedup=None if aer is None else 1 / aer,
        model=model_id(model),
        seed=trainer.args.seed,
        n_heads=None if geometry is None else len(geometry.heads),
        layer_heads=None if geometry is None else {str(layer): geometry[layer].n_heads for layer in geometry},
        heads=None if state is None else _by_layer(state.heads),
        localize_method=None if state is None else state.localize_method,
        pool_rows=pool_rows,
        pool_tokens=pool_tokens,
        selected_rows=pool_rows if state is None or state.rows is None else len(state.rows),
        selected_tokens=pool_tokens if state is None else state.selected_tokens,
        scorer=None if state is None else state.scorer,
        scoring_heads=None if state is None else _by_layer(state.scoring_heads),
        trainable_parameters=get_model_param_count(model, trainable_only=True),
        total_parameters=get_model_param_count(model),
        arguments={**changed_arguments(trainer.args), **_other_adapter(model)},
    )


def _seconds_of(reference: Reference, trainer: P2DTrainer, epochs: float) -> float:
    given = trainer.args.reference_seconds
    if reference.source == "given" and given is not None:
        # It is for the whole training, be that told in epochs or in steps.
        return given * trainer.state.global_step / trainer.state.max_steps
    return reference.seconds_per_epoch * epochs


def _by_layer(heads: HeadSet | None) -> dict[str, list[int]] | None:
    return None if heads is None else heads.to_dict()["heads"]


def _other_adapter(model: Any) -> dict[str, bool | int | float | str | None]:
    """The kind of the adapter that was trained, where it is not HeadSparse."""
    if not is_peft_model(model) or is_head_sparse(model):
        return {}
    kind = model.peft_config[model.active_adapter].peft_type
    return {"peft_type": str(kind.value if isinstance(kind, Enum) else kind)}


def changed_arguments(args: TrainingArguments) -> dict[str, bool | int | float | str | None]:
    """
    The arguments that are not the defaults, as far as they may be published and bear on the result: no paths, no tokens,
    nothing of where results go, and no objects. Of tokens, those of the text are told.

    Args:
        args (`TrainingArguments`): A trainer's arguments.
    """
    arguments: dict[str, bool | int | float | str | None] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        if not (value is None or isinstance(value, bool | int | float | str)) or value == field.default:
            continue
        is_path = isinstance(value, str) and ("/" in value or "\\" in value) and field.name not in _WORDS
        if is_path or not math.isfinite(value if isinstance(value, float) else 0) or _NOT_OF_RESULT.match(field.name):
            continue
        arguments[field.name] = value
    return arguments


def _size_of_all(trainer: P2DTrainer) -> tuple[int | None, int | None]:
    """Rows and tokens of the whole dataset, as far as it tells: a stream has no length, and packed rows are others."""
    pool = trainer.train_dataset
    if not isinstance(pool, Dataset):
        return None, None
    n_tokens = count_tokens(pool, trainer.args) if "input_ids" in pool.column_names else None
    return None if trainer.args.packing else len(pool), n_tokens


def report_metrics(report: P2DReport) -> dict[str, float]:
    """What of a report goes into the final metrics, with the Trainer's prefix `train_`."""
    metrics: dict[str, float | None] = {
        f"{stage}_{name}": value
        for name, by_stage in (
            ("seconds", report.stage_seconds),
            ("tokens", report.stage_tokens),
            ("peak_memory_bytes", report.stage_peak_memory),
        )
        for stage, value in by_stage.items()
    }
    for name in (
        "reference_seconds",
        "reference_relative_error",
        "aer",
        "speedup",
        "selected_rows",
        "selected_tokens",
    ):
        metrics[name] = getattr(report, name)
    return {f"train_p2d_{name}": value for name, value in metrics.items() if value is not None}
