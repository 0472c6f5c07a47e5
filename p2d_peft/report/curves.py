"""The curves of a training: from the log in `trainer_state.json` to charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# What a log entry holds beside curves: the clock, counters, and the final entry's totals.
_NO_CURVES = ("epoch", "step", "total_flos", "num_tokens", "num_input_tokens_seen")
_NO_CURVE_ENDINGS = ("_runtime", "_per_second", "_num_tokens", "_model_preparation_time")
# Titles of the charts that come first; the others go by their names, sorted.
_TITLES = {
    "loss": "Loss",
    "mean_token_accuracy": "Share of tokens predicted right",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient",
}
# Enough for any screen; a longer curve is drawn by every n-th of its points.
MOST_POINTS = 400
MOST_CHARTS = 12


@dataclass(frozen=True)
class Curve:
    """
    One line of a chart.

    Args:
        name (`str`): What it is of: `"training"`, `"evaluation"`, or `"evaluation, <data set>"`.
        points (`list[tuple[float, float]]`): Steps, ascending, and values.
    """

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class CurveChart:
    """
    The curves of one quantity.

    Args:
        title (`str`): What it is.
        curves (`list[Curve]`): At least one.
    """

    title: str
    curves: list[Curve]


def curve_charts(log_history: Any) -> list[CurveChart]:
    """
    The charts of a trainer's log.

    Args:
        log_history (`list[dict[str, float]]`): As `trainer_state.json` has it. What is no number is left out.

    Returns:
        `list[CurveChart]`: the loss first, no more than 12.
    """
    points: dict[str, dict[float, float]] = {}
    for entry in log_history if isinstance(log_history, list) else ():
        if not isinstance(entry, Mapping) or not _is_number(entry.get("step")) or "train_runtime" in entry:
            continue
        for name, value in entry.items():
            if isinstance(name, str) and _is_number(value) and _is_curve(name):
                points.setdefault(name, {})[float(entry["step"])] = float(value)
    charts: dict[str, list[Curve]] = {}
    for name, values in points.items():
        quantity, source = _parts(name, points)
        charts.setdefault(quantity, []).append(Curve(source, _thinned(sorted(values.items()))))
    order = sorted(charts, key=lambda quantity: (*_place(quantity), quantity))
    return [CurveChart(_TITLES.get(quantity, _words(quantity)), charts[quantity]) for quantity in order][:MOST_CHARTS]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _is_curve(name: str) -> bool:
    return name not in _NO_CURVES and not name.endswith(_NO_CURVE_ENDINGS)


def _parts(name: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """The quantity that an entry of the log is of, and what it was measured on."""
    if not name.startswith("eval_"):
        return name, "training"
    rest = name.removeprefix("eval_")
    # of several evaluation sets: eval_<set>_<quantity>
    quantities = [quantity for quantity in (*_TITLES, *names) if rest == quantity or rest.endswith(f"_{quantity}")]
    quantity = max(quantities, key=len, default=rest)
    data_set = rest.removesuffix(quantity).rstrip("_")
    return quantity, f"evaluation, {data_set}" if data_set else "evaluation"


def _words(quantity: str) -> str:
    words = quantity.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _place(quantity: str) -> tuple[int]:
    titles = list(_TITLES)
    return (titles.index(quantity) if quantity in titles else len(titles),)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = math.ceil(len(points) / MOST_POINTS)
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
