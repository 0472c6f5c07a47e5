import math

import pytest

from p2d_peft.report import charts
from p2d_peft.report.charts import Axis, compared_histogram, line_chart, number, round_numbers, stacked_histogram
from p2d_peft.report.curves import Curve, CurveChart
from p2d_peft.report.data_records import Histogram


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (3.77, 4.6, [3.8, 4.0, 4.2, 4.4, 4.6]), (1e-5, 9e-5, [2e-5, 4e-5, 6e-5, 8e-5])],
)  # fmt: skip
def test_round_numbers(low, high, expected):
    assert round_numbers(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "limits", [(0, 5e-324), (-1.7e308, 1.7e308), (1e16, 1e16 + 2), (1.0, math.nextafter(1, 2)), (0, 1e-310)]
)
def test_no_limits_are_too_much(limits):
    axis = Axis(*limits, start=0, end=100)
    assert len(axis.ticks) <= 12
    assert all(math.isfinite(place) for place, _ in axis.ticks)


def test_numbers_to_read():
    assert [number(value) for value in (1234, 0.5, 1e-9, 1234.5678, 2e9, -3.0, 0)] == [
        "1,234", "0.5", "1e-09", "1,235", "2e+09", "-3", "0",
    ]  # fmt: skip


def test_a_stacked_histogram_has_each_row_once():
    histogram = Histogram([0.0, 1.0, 2.0], kept=[0, 30], left_out=[60, 10])
    chart = stacked_histogram(histogram, cut=1.5)
    unit = chart.y(0) - chart.y(1)
    heights = [bar.height for bar in chart.kept], [bar.height for bar in chart.left_out]
    assert heights[0] == pytest.approx([0, 30 * unit], abs=0.3) and heights[1] == pytest.approx(
        [60 * unit, 10 * unit], abs=0.3
    )
    # what was left out stands on what was kept
    assert chart.left_out[1].y + chart.left_out[1].height == pytest.approx(chart.kept[1].y, abs=0.3)
    assert chart.cut == chart.x(1.5) and chart.hover[1][1] == "score 1 to 2\n30 of 40 rows kept"
    assert stacked_histogram(Histogram([-1.0, 1.0], [1], [1]), cut=0.0).cut == (charts.LEFT + charts.RIGHT) / 2
    assert stacked_histogram(histogram, cut=9.0).cut is None  # of a file that someone changed


def test_lengths_are_compared_by_their_shares():
    histogram = Histogram([10, 20, 30], kept=[10, 0], left_out=[40, 50])
    chart = compared_histogram(histogram, lambda low, high: f"{low} to {high}")
    before, after = ([bar.height for bar in bars] for bars in (chart.left_out, chart.kept))
    assert before[0] == pytest.approx(before[1]) == pytest.approx(after[0] / 2, abs=0.3) and after[1] == 0
    assert chart.hover[0][1] == "10 to 20\nbefore: 50 % of the rows\nafter: 100 %"


def test_lines_stay_in_the_picture_and_hovering_covers_it():
    chart = line_chart(
        CurveChart("Loss", [Curve("training", [(1, 2.0), (5, 1.0), (9, 0.5)]), Curve("evaluation", [(9, 0.7)])])
    )
    for _, points in chart.lines:
        assert all(charts.LEFT <= x <= charts.RIGHT and charts.TOP <= y <= charts.BOTTOM for x, y in points)
    bars = [bar for bar, _ in chart.hover]
    assert bars[0].x == charts.LEFT and sum(bar.width for bar in bars) == pytest.approx(charts.RIGHT - charts.LEFT)
    assert (
        chart.hover[-1][1] == "step 9\ntraining: 0.5\nevaluation: 0.7" and chart.hover[0][1] == "step 1\ntraining: 2"
    )
    assert chart.last == [("training", "0.5"), ("evaluation", "0.7")]


def test_one_point_is_a_chart():
    chart = line_chart(CurveChart("Loss", [Curve("training", [(1, 0.0)])]))
    ((_, [(x, y)]),) = chart.lines
    assert charts.LEFT < x < charts.RIGHT and charts.TOP < y < charts.BOTTOM
