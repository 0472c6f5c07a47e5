import math

import matplotlib
import pytest
import torch

from p2d_peft.heads import HeadScores, HeadSet


matplotlib.use("Agg")


def scores(values):
    return HeadScores(torch.tensor(values), method="taylor", seed=1, n_samples=5, model_id="m", seconds=0.5)


def test_top_takes_the_highest_and_at_least_one():
    table = scores([[0.1, 0.9], [0.5, 0.3]])
    assert table.top(0.5) == HeadSet([(0, 1), (1, 0)])
    assert table.top(1e-9) == HeadSet([(0, 1)])
    assert len(table.top(1.0)) == 4


def test_ties_go_to_the_lower_layer_and_head():
    assert scores([[1.0, 1.0], [1.0, 1.0]]).top(0.5) == HeadSet([(0, 0), (0, 1)])


def test_per_layer_spreads_the_choice():
    table = scores([[4.0, 3.0], [2.0, 1.0]])
    assert table.top(0.5) == HeadSet([(0, 0), (0, 1)])
    assert table.top(0.5, per_layer=1) == HeadSet([(0, 0), (1, 0)])
    with pytest.raises(ValueError, match=r"`per_layer`=1 leaves 2 heads, but `ratio`=0\.75 asks for 3 of 4"):
        table.top(0.75, per_layer=1)


def test_missing_heads_are_never_taken():
    table = scores([[math.nan, math.nan], [2.0, 1.0]])
    assert table.n_heads == 2
    assert table.top(1.0) == HeadSet([(1, 0), (1, 1)])


def test_json_round_trip(tmp_path):
    table = scores([[0.1, math.nan], [1 / 3, -2.0]])
    table.save(tmp_path / "scores.json")
    loaded = HeadScores.load(tmp_path / "scores.json")
    torch.testing.assert_close(loaded.values, table.values, rtol=0, atol=0, equal_nan=True)
    assert loaded.to_dict() == table.to_dict()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, math.nan])
def test_bad_ratios_are_named(ratio):
    with pytest.raises(ValueError, match=rf"`ratio` must be in \(0, 1\], got {ratio}"):
        scores([[1.0]]).top(ratio)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        scores([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="infinities"):
        scores([[math.inf]])
    with pytest.raises(ValueError, match="not a table of head scores"):
        HeadScores.from_dict({"format": "p2d_peft.HeadSet"})


def test_plot_draws_the_table_and_marks_the_heads():
    table = scores([[0.1, 0.9, 0.2], [0.5, 0.3, 0.4]])
    axes = table.plot(heads=table.top(0.34))
    (image,) = axes.images
    assert image.get_array().tolist() == table.values.tolist()
    assert sorted(patch.get_xy() for patch in axes.patches) == [(-0.5, 0.5), (0.5, -0.5)]
