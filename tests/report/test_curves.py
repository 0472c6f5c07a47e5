import math

import pytest

from p2d_peft.report.curves import MOST_CHARTS, MOST_POINTS, curve_charts


def test_training_and_evaluation_of_a_quantity_share_a_chart():
    log = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
        {"step": 2, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
        {"step": 2, "eval_math_loss": 1.2, "eval_code_loss": 1.3, "eval_exact_match": 0.4, "eval_num_tokens": 7},
        {"step": 2, "train_runtime": 9.0, "train_loss": 1.5},
    ]
    loss, rate, match = curve_charts(log)
    assert (loss.title, rate.title, match.title) == ("Loss", "Learning rate", "Exact match")
    assert {curve.name: curve.points for curve in loss.curves} == {
        "training": [(1, 2.0), (2, 1.0)],
        "evaluation": [(2, 1.5)],
        "evaluation, math": [(2, 1.2)],
        "evaluation, code": [(2, 1.3)],
    }
    assert [curve.name for curve in match.curves] == ["evaluation"]


@pytest.mark.parametrize(
    "log", [None, "x", {}, [], [1, None, {"loss": 1}, {"step": "1", "loss": 1}, {"step": 10**400, "loss": 1}]]
)
def test_what_is_no_log_gives_no_curves(log):
    assert curve_charts(log) == []


def test_what_is_no_number_is_left_out():
    log = [
        {"step": step, "loss": loss}
        for step, loss in enumerate((1.0, math.nan, math.inf, "2", True, None, 10**400, 3.0))
    ]
    (chart,) = curve_charts(log)
    assert chart.curves[0].points == [(0, 1.0), (7, 3.0)]


def test_long_curves_are_thinned_to_their_last_point():
    (chart,) = curve_charts([{"step": step, "loss": float(step)} for step in range(20_001)])
    points = chart.curves[0].points
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS + 1 and points[0] == (0, 0) and points[-1] == (20_000, 20_000)


def test_there_is_an_end_to_charts():
    assert len(curve_charts([{"step": 1, **{f"reward_{n}": 1.0 for n in range(99)}}])) == MOST_CHARTS
