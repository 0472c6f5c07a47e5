"""Where the marks of the page's charts go: from numbers to coordinates in an SVG of 400 x 230 units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .curves import CurveChart
from .data_records import Histogram


WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 10, 196


@dataclass(frozen=True)
class Axis:
    """
    A linear axis.

    Args:
        low, high (`float`): The values at its ends.
        start, end (`float`): Where these are in the picture.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        # halves, so that no difference of two finite numbers overflows
        span = self.high / 2 - self.low / 2
        share = (value / 2 - self.low / 2) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where to put which round numbers: about five."""
        return [(self(value), number(value)) for value in round_numbers(self.low, self.high)]


def round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """About so many numbers between two that are multiples of 1, 2 or 5 times a power of ten."""
    rough = high / count - low / count
    if not 1e-300 < rough < 1e300:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)
    # an end that is such a number is one of them, whatever the rounding
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number to read: four digits that mean something, in the least space."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{value:,.0f}"
    return f"{value:,.4g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    """Limits with some air, that are not equal."""
    margin = 0.05 * (high - low) or 0.1 * abs(low) or 1.0
    if not math.isfinite(margin):
        return low, high
    return low - margin, high + margin


@dataclass(frozen=True)
class Bar:
    """A bar: its upper left corner and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class HistogramChart:
    """
    A histogram.

    Args:
        x, y (`Axis`): The axes.
        left_out, kept (`list[Bar]`): One of each for each bin.
        hover (`list[tuple[Bar, str]]`): What to say where.
        cut (`float`, *optional*): Where the cut is.
    """

    x: Axis
    y: Axis
    left_out: list[Bar]
    kept: list[Bar]
    hover: list[tuple[Bar, str]]
    cut: float | None = None


def stacked_histogram(histogram: Histogram, cut: float) -> HistogramChart:
    """Counts: what was left out on top of what was kept."""
    totals = histogram.totals
    x, y = _histogram_axes(histogram, max(totals))
    kept = [_bar(x, y, *bin_, 0, count) for bin_, count in zip(_bins(histogram), histogram.kept, strict=True)]
    left_out = [
        _bar(x, y, *bin_, count, total)
        for bin_, count, total in zip(_bins(histogram), histogram.kept, totals, strict=True)
    ]
    tips = [
        f"score {number(low)} to {number(high)}\n{count:,} of {total:,} rows kept"
        for (low, high), count, total in zip(_bins(histogram), histogram.kept, totals, strict=True)
    ]
    inside = histogram.edges[0] <= cut <= histogram.edges[-1]
    return HistogramChart(x, y, left_out, kept, _hover(x, histogram, tips), x(cut) if inside else None)


def compared_histogram(histogram: Histogram, unit: Callable[[float, float], str]) -> HistogramChart:
    """
    Shares, in percent: those of all rows behind those of the kept ones, each of its own total.

    Args:
        histogram (`Histogram`): The counts.
        unit (`Callable[[float, float], str]`): What to call a bin, by its edges.
    """
    before, after = histogram.percentages()
    x, y = _histogram_axes(histogram, max(before + after))
    bins = _bins(histogram)
    narrow = [(low + 0.25 * (high - low), high - 0.25 * (high - low)) for low, high in bins]
    tips = [
        f"{unit(low, high)}\nbefore: {a:.3g} % of the rows\nafter: {b:.3g} %"
        for (low, high), a, b in zip(bins, before, after, strict=True)
    ]
    return HistogramChart(
        x,
        y,
        [_bar(x, y, *bin_, 0, share) for bin_, share in zip(bins, before, strict=True)],
        [_bar(x, y, *bin_, 0, share) for bin_, share in zip(narrow, after, strict=True)],
        _hover(x, histogram, tips),
    )


def _bins(histogram: Histogram) -> list[tuple[float, float]]:
    return list(pairwise(histogram.edges))


def _histogram_axes(histogram: Histogram, highest: float) -> tuple[Axis, Axis]:
    return Axis(histogram.edges[0], histogram.edges[-1], LEFT, RIGHT), Axis(0, max(highest, 1) * 1.05, BOTTOM, TOP)


def _bar(x: Axis, y: Axis, left: float, right: float, low: float, high: float) -> Bar:
    return Bar(x(left), y(high), round(max(x(right) - x(left) - 0.5, 0.5), 2), round(y(low) - y(high), 2))


def _hover(x: Axis, histogram: Histogram, tips: list[str]) -> list[tuple[Bar, str]]:
    return [
        (Bar(x(low), TOP, round(x(high) - x(low), 2), BOTTOM - TOP), tip)
        for (low, high), tip in zip(_bins(histogram), tips, strict=True)
    ]


@dataclass(frozen=True)
class LineChart:
    """
    Some lines.

    Args:
        title (`str`): What they are of.
        x, y (`Axis`): The axes.
        lines (`list[tuple[str, list[tuple[float, float]]]]`): For each its name and its points in the picture.
        hover (`list[tuple[Bar, str]]`): What to say where.
        last (`list[tuple[str, str]]`): For each line its name and its last value.
    """

    title: str
    x: Axis
    y: Axis
    lines: list[tuple[str, list[tuple[float, float]]]]
    hover: list[tuple[Bar, str]]
    last: list[tuple[str, str]]


def line_chart(chart: CurveChart) -> LineChart:
    """The curves of a quantity as lines over the steps."""
    steps = sorted({step for curve in chart.curves for step, _ in curve.points})
    values = [value for curve in chart.curves for _, value in curve.points]
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else _padded(steps[0], steps[0])
    x, y = Axis(first, last, LEFT, RIGHT), Axis(*_padded(min(values), max(values)), BOTTOM, TOP)
    tables = [(curve.name, dict(curve.points)) for curve in chart.curves]
    tips = [
        "\n".join([f"step {number(step)}", *(f"{name}: {number(at[step])}" for name, at in tables if step in at)])
        for step in steps
    ]
    return LineChart(
        chart.title,
        x,
        y,
        [(curve.name, [(x(step), y(value)) for step, value in curve.points]) for curve in chart.curves],
        _columns([x(step) for step in steps], tips),
        [(curve.name, number(curve.points[-1][1])) for curve in chart.curves],
    )


def _columns(places: Sequence[float], tips: list[str]) -> list[tuple[Bar, str]]:
    """A column around each place, up to half the way to its neighbours."""
    middles = [(a + b) / 2 for a, b in pairwise(places)]
    edges = [LEFT, *middles, RIGHT]
    return [
        (Bar(round(a, 2), TOP, round(b - a, 2), BOTTOM - TOP), tip)
        for a, b, tip in zip(edges, edges[1:], tips, strict=False)
    ]
