"""A measured run of full fine-tuning: what the JSON file that it left tells of its speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..report import P2DReport
from ..report.run_report import REPORT_NAME


# What to look for in a folder, the most telling file first.
NAMES = (REPORT_NAME, "trainer_state.json", "train_results.json", "all_results.json")
# Of a model's weights; some have a table of positions that is never trained.
FULLY_TRAINED = 0.99


@dataclass(frozen=True)
class MeasuredRun:
    """
    A run of full fine-tuning.

    Args:
        path (`Path`): The file.
        seconds_per_epoch (`float`): Seconds of an epoch.
        pool_rows (`float`, *optional*): Rows of an epoch.
        pool_rows_error (`float`): By how much `pool_rows` may be off, as the file rounds.
        model (`str`, *optional*): Id or path of the model.
        device (`str`, *optional*): The kind of device.
        processes (`int`, *optional*): How many processes it ran in.
    """

    path: Path
    seconds_per_epoch: float
    pool_rows: float | None = None
    pool_rows_error: float = 0.0
    model: str | None = None
    device: str | None = None
    processes: int | None = None

    @classmethod
    def read(cls, path: str | Path) -> MeasuredRun:
        """
        Read the file of a run.

        Args:
            path (`str` or `Path`): A `p2d_report.json`, or a `trainer_state.json`, `train_results.json` or
                `all_results.json` of any transformers Trainer, or a folder that holds one of them.

        Raises:
            `ValueError`: if there is no such file, it does not hold a training time and epochs, or it tells that the run
                was not one of full fine-tuning, or was interrupted.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in NAMES if (path / name).is_file()]
            if not found:
                raise ValueError(f"`reference_report`='{path}' is a folder without any of {', '.join(NAMES)}.")
            path = found[0]
        if not path.is_file():
            raise ValueError(f"`reference_report`='{path}' does not exist.")
        data = read_json(path)
        if P2DReport.is_format_of(data):
            return _of_report(path, P2DReport.load(path))
        if isinstance(data, Mapping) and isinstance(data.get("log_history"), list):
            return _of_state(path, data)
        if isinstance(data, Mapping) and "train_runtime" in data:
            return _of_metrics(path, data)
        raise ValueError(
            f"`reference_report`='{path}' holds no training time; pass a {REPORT_NAME} or what "
            "`trainer.save_state()` or `trainer.save_metrics('train', metrics)` wrote after the training."
        )


def _of_report(path: Path, report: P2DReport) -> MeasuredRun:
    if set(report.stage_seconds) != {"train"} or report.scorer is not None:
        raise _of_p2d(path)
    if report.trainable_parameters < FULLY_TRAINED * report.total_parameters:
        raise ValueError(
            f"`reference_report`='{path}' is of a run that trained {report.trainable_parameters:,} of "
            f"{report.total_parameters:,} weights, but the reference is full-parameter fine-tuning. If you do want "
            "the AER relative to this run, give its time as `reference_seconds`."
        )
    return MeasuredRun(
        path,
        _positive(path, "stage_seconds['train']", report.stage_seconds["train"])
        / _positive(path, "epochs", report.epochs),
        report.pool_rows,
        model=report.model,
        device=report.device,
        processes=report.processes,
    )


def _of_state(path: Path, state: Mapping[str, Any]) -> MeasuredRun:
    """`trainer_state.json`: with its history one can tell evaluation from training, and whether the run was resumed."""
    history: list[Mapping[str, Any]] = state["log_history"]
    place = max((index for index, entry in enumerate(history) if "train_runtime" in entry), default=None)
    if place is None:
        raise ValueError(
            f"`reference_report`='{path}' holds no training time: a checkpoint is written before the training ends. "
            "Call `trainer.save_state()` after it, or pass its `train_results.json`."
        )
    metrics = {"epoch": state.get("epoch"), **history[place]}
    runtime, n_steps = _positive(path, "train_runtime", metrics["train_runtime"]), state.get("global_step")
    speed = metrics.get("train_steps_per_second")
    # both rounded to 3 digits after the point
    if n_steps and speed is not None and (speed + 0.0005) * runtime < 0.99 * n_steps:
        raise ValueError(
            f"`reference_report`='{path}' is of a run that was resumed: its {runtime:.0f} s are those of about "
            f"{speed * runtime:.0f} of its {n_steps} steps. Pass a run that was not interrupted, or the sum as "
            "`reference_seconds`."
        )
    # the history of a training starts with it
    evaluation = sum(
        seconds
        for entry in history[:place]
        for name, seconds in entry.items()
        if name.startswith("eval") and name.endswith("_runtime")
    )
    return _of_metrics(path, metrics, evaluation)


def _of_metrics(path: Path, metrics: Mapping[str, Any], evaluation: float = 0.0) -> MeasuredRun:
    """The metrics of a training, of which so many seconds were spent on evaluation."""
    if any(name.startswith("train_p2d_") for name in metrics):
        raise _of_p2d(path)
    runtime = _positive(path, "train_runtime", metrics["train_runtime"])
    epochs = _positive(path, "epoch", metrics.get("epoch"))
    seconds = _positive(path, "train_runtime without evaluation", runtime - evaluation)
    speed = metrics.get("train_samples_per_second")
    return MeasuredRun(
        path,
        seconds / epochs,
        None if speed is None else speed * runtime / epochs,
        # Trainer rounds the speed to 3 digits after the point, the seconds to 4
        0.0 if speed is None else (0.0005 * runtime + 0.00005 * speed) / epochs,
    )


def _of_p2d(path: Path) -> ValueError:
    return ValueError(
        f"`reference_report`='{path}' is of a run of P2D, but the reference is full-parameter fine-tuning on the whole "
        "pool. Run the same script with `p2d=False` and without `peft_config`, and pass what that run wrote."
    )


def _positive(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`reference_report`='{path}' must hold a positive {name}, got {value!r}.")
    return float(value)
