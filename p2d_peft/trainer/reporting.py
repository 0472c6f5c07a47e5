"""From a finished training to its `P2DReport` and its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..efficiency import alignment_efficiency_ratio
from ..heads import ModelGeometry
from ..model_state import model_id
from ..report import P2DReport
from .state import P2DState


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer


def make_report(trainer: P2DTrainer, state: P2DState, stage_seconds: dict[str, float]) -> P2DReport:
    """
    The record of a training run.

    Args:
        trainer (`P2DTrainer`): The trainer at the end of its training.
        state (`P2DState`): The choices it was made with.
        stage_seconds (`dict[str, float]`): Seconds of the stages.
    """
    epochs = float(trainer.state.epoch or 0.0)
    reference = state.reference
    reference_seconds = reference.seconds_per_epoch * epochs if reference is not None and epochs > 0 else None
    aer = None if reference_seconds is None else alignment_efficiency_ratio(stage_seconds, reference_seconds)
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = list(model.parameters())
    return P2DReport(
        stage_seconds=stage_seconds,
        epochs=epochs,
        reference_seconds=reference_seconds,
        reference_source=reference.source if reference is not None else None,
        reference_relative_error=reference.relative_error if reference is not None else None,
        aer=aer,
        speedup=None if aer is None else 1 / aer,
        model=model_id(model),
        seed=trainer.args.seed,
        n_heads=len(ModelGeometry.of(model).heads),
        heads=state.heads.to_dict()["heads"] if state.heads is not None else None,
        localize_method=state.localize_method,
        pool_rows=state.pool_rows,
        pool_tokens=state.pool_tokens,
        selected_rows=state.pool_rows if state.rows is None else len(state.rows),
        selected_tokens=state.selected_tokens,
        scorer=state.scorer,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def report_metrics(report: P2DReport) -> dict[str, float]:
    """What of a report goes into the final metrics, with the Trainer's prefix `train_`."""
    metrics: dict[str, float] = {f"train_p2d_{stage}_seconds": value for stage, value in report.stage_seconds.items()}
    if report.aer is not None and report.speedup is not None and report.reference_seconds is not None:
        metrics["train_p2d_reference_seconds"] = report.reference_seconds
        metrics["train_p2d_aer"] = report.aer
        metrics["train_p2d_speedup"] = report.speedup
    if report.selected_rows is not None and report.selected_tokens is not None:
        metrics["train_p2d_selected_rows"] = report.selected_rows
        metrics["train_p2d_selected_tokens"] = report.selected_tokens
    return metrics
