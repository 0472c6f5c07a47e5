"""The page's plots as pictures (PNG), for the model card. What quotes the data is on none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing
from .costs import Costs
from .data_records import SelectionRecord
from .run_folder import Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS_NAME = "p2d_costs.png"
DATA_NAME = "p2d_data.png"
CURVES_NAME = "p2d_curves.png"
PICTURE_NAMES = (COSTS_NAME, DATA_NAME, CURVES_NAME)

_COLORS = {"localize": "#7b4fc9", "select": "#0f857a", "train": "#0a63c2"}
_KEPT, _REST, _CUT = "#0a63c2", "#a3aebd", "#b3390f"
_CURVES = (_KEPT, _CUT, "#0f857a", "#7b4fc9")


def save_pictures(folder: str | Path, run: Run) -> dict[str, str]:
    """
    Save the plots of a run beside its report, and remove those that an earlier run left and this one has not.

    Args:
        folder (`str` or `Path`): Where.
        run ([`Run`]): The run.

    Returns:
        `dict[str, str]`: the names of the pictures, and what is on them in words.

    Raises:
        `ImportError`: if matplotlib is missing.
    """
    for name in PICTURE_NAMES:
        Path(folder, name).unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures of a run need matplotlib: `pip install 'p2d_peft[plots]'`.") from error
    costs, selection, curves = Costs.of(run.report), run.selection, run.curves[:2]
    said: dict[str, str] = {}

    def save(name: str, size: tuple[float, float], draw: Callable[[Figure], None], words: str) -> None:
        # no pyplot: it would choose a backend, and keep the figure, for the whole process
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        with replacing(Path(folder, name)) as temporary:
            # without matplotlib's own version in it, the same run gives the same file
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        said[name] = words

    if costs.stages:
        beside = "" if costs.reference is None else " beside full fine-tuning on all rows"
        save(COSTS_NAME, (8, 1.9), lambda figure: _draw_costs(figure, costs), f"The time of the stages{beside}")
    if selection is not None:
        words = "Histograms of the rows' scores, with the cut, and of their lengths before and after"
        save(DATA_NAME, (8, 3), lambda figure: _draw_data(figure, selection), words)
    if curves:
        names = " and ".join(chart.title.lower() for chart in curves)
        save(CURVES_NAME, (8, 3), lambda figure: _draw_curves(figure, run), f"Curves of the training: {names}")
    return said


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _draw_costs(figure: Figure, costs: Costs) -> None:
    axes = figure.subplots()
    left = 0.0
    for stage in costs.stages:
        axes.barh("this run", stage.seconds, left=left, color=_COLORS[stage.name], label=stage.name)
        left += stage.seconds
    if costs.reference is not None:
        hatch = "//" if costs.is_estimate else None
        axes.barh(
            "full fine-tuning",
            costs.reference,
            color=_REST,
            hatch=hatch,
            edgecolor="white",
            label=f"reference, {costs.source}",
        )
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    _plain(axes)


def _draw_data(figure: Figure, selection: SelectionRecord) -> None:
    scores, lengths = figure.subplots(1, 2)
    histogram = selection.scores
    scores.stairs(histogram.kept, histogram.edges, fill=True, color=_KEPT, label="kept")
    scores.stairs(histogram.totals, histogram.edges, baseline=histogram.kept, fill=True, color=_REST, label="left out")
    scores.axvline(selection.cut, color=_CUT, linestyle="--", linewidth=1.2, label="cut")
    scores.set(xlabel="score", ylabel="rows")
    histogram = selection.lengths
    before, after = histogram.percentages()
    lengths.stairs(before, histogram.edges, fill=True, color=_REST, label="before")
    lengths.stairs(after, histogram.edges, color=_KEPT, linewidth=1.6, label="after")
    lengths.set(xlabel="tokens of a row", ylabel="% of the rows")
    for axes in (scores, lengths):
        axes.legend(frameon=False, fontsize="small")
        _plain(axes)


def _draw_curves(figure: Figure, run: Run) -> None:
    charts = run.curves[:2]
    for axes, chart in zip(figure.subplots(1, 2), charts, strict=False):
        axes.set_prop_cycle(color=_CURVES)
        for curve in chart.curves:
            marker = "o" if len(curve.points) <= 12 else None
            # a name from the log is no formula, and one with "_" in front is shown, too
            axes.plot(*zip(*curve.points, strict=True), marker=marker, label=f"\u200b{curve.name}".replace("$", r"\$"))
        axes.set(xlabel="step", title=chart.title.replace("$", r"\$"))
        axes.legend(frameon=False, fontsize="small")
        _plain(axes)
    for axes in figure.axes[len(charts) :]:
        axes.set_visible(False)
