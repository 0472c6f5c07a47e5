import math
import sys

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
    data = scores([[1.0, 2.0]]).to_dict()
    with pytest.raises(ValueError, match="an integer that is too long for a float"):
        HeadScores.from_dict({**data, "values": [[10**400, 1.0]]})
    with pytest.raises(ValueError, match="not a table of head scores"):
        HeadScores.from_dict({"format": "p2d_peft.HeadSet"})


def test_plot_draws_the_table_and_marks_the_heads():
    table = scores([[0.1, 0.9, 0.2], [0.5, 0.3, 0.4]])
    axes = table.plot(heads=table.top(0.34))
    (image,) = axes.images
    assert image.get_array().tolist() == table.values.tolist()
    assert sorted(patch.get_xy() for patch in axes.patches) == [(-0.5, 0.5), (0.5, -0.5)]


ADDRESSES = ("cross.0", "decoder.0", "encoder.0")


def text_to_text_scores():
    return HeadScores(torch.tensor([[0.1, 0.9], [0.5, 0.3], [0.2, 0.8]]), "gate", layers=ADDRESSES)


def test_rows_may_be_addresses(tmp_path):
    table = text_to_text_scores()
    assert table.top(0.34) == HeadSet([("cross.0", 1), ("encoder.0", 1)])
    table.save(tmp_path / "scores.json")
    loaded = HeadScores.load(tmp_path / "scores.json")
    assert loaded.layers == ADDRESSES and loaded.top(0.34) == table.top(0.34)
    axes = table.plot(heads=HeadSet([("encoder.0", 1)]))
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ADDRESSES)
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, 1.5)]


def test_files_without_layers_are_numbered():
    data = scores([[0.1, 0.9], [0.5, 0.3]]).to_dict()
    assert data.pop("layers") == [0, 1]
    assert HeadScores.from_dict(data).layers == (0, 1)


def test_layers_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"`layers` must be in ascending order, .* got \(1, 0\)"):
        HeadScores(torch.ones(2, 2), "taylor", layers=(1, 0))


@pytest.mark.parametrize("layers", [(0,), (0, 0), (0, 1, 2), ("encoder.0", "encoder.1", "encoder.1")])
def test_layers_that_do_not_name_the_rows_are_refused(layers):
    with pytest.raises(ValueError, match="`layers` must name each of the 2 rows of `values` once"):
        HeadScores(torch.zeros(2, 2), "gate", layers=layers)


def test_a_number_of_heads_in_place_of_a_ratio():
    table = scores([[0.1, 0.9], [0.5, 0.3]])
    assert table.top(k=3) == HeadSet([(0, 1), (1, 0), (1, 1)]) == table.top(0.75)
    with pytest.raises(ValueError, match="not both"):
        table.top(0.1, k=1)


def test_at_least_so_many_of_each_layer():
    table = scores([[4.0, 3.0], [2.0, 1.0], [math.nan, math.nan]])
    assert table.top(k=2, per_layer=(1, None)) == HeadSet([(0, 0), (1, 0)])
    assert table.top(k=3, per_layer=(1, 2)) == HeadSet([(0, 0), (0, 1), (1, 0)])
    with pytest.raises(
        ValueError, match=r"`per_layer`=\(2, None\) takes at least 4 heads of 2 layers, but `k`=3 asks"
    ):
        table.top(k=3, per_layer=(2, None))
    with pytest.raises(ValueError, match=r"`per_layer`=\(1, 1\) leaves 2 heads, but `k`=3 asks for 3 of 4"):
        table.top(k=3, per_layer=(1, 1))


def test_heads_of_one_end_of_the_layers():
    table = scores([[9.0, 8.0], [7.0, 6.0], [5.0, 4.0], [3.0, 2.0], [1.0, 0.0]])
    assert table.top(k=2, last_layers=0.4) == HeadSet([(3, 0), (3, 1)])
    assert table.top(k=2, first_layers=0.4) == HeadSet([(0, 0), (0, 1)])
    assert table.top(k=2, last_layers=0.4, per_layer="even") == HeadSet([(3, 0), (4, 0)])
    # rounded, but one layer at least
    assert table.top(k=1, last_layers=1e-9) == HeadSet([(4, 0)])
    assert table.top(k=1, last_layers=0.5) == HeadSet([(3, 0)])
    assert table.top(0.3, first_layers=1.0, per_layer=1) == table.top(0.3, last_layers=1.0, per_layer=1)
    # as many more layers as it takes
    assert table.top(k=3, last_layers=0.2) == HeadSet([(3, 0), (3, 1), (4, 0)])
    assert table.top(k=3, last_layers=0.2, per_layer=1) == HeadSet([(2, 0), (3, 0), (4, 0)])
    assert len(table.top(1.0, first_layers=0.2)) == 10
    # the backward pass may end higher up still
    assert table.top(k=1, last_layers=0.6, cost_aware=True) == HeadSet([(2, 0)])


def test_one_end_of_each_stack():
    values = torch.arange(10.0).reshape(5, 2)
    layers = ("decoder.0", "decoder.1", "encoder.0", "encoder.1", "encoder.2")
    table = HeadScores(values, "gate", layers=layers)
    assert table.top(k=4, first_layers=0.4).layers == ("decoder.0", "encoder.0")
    assert table.top(k=4, last_layers=0.4).layers == ("decoder.1", "encoder.2")
    assert table.top(k=6, last_layers=0.4).layers == ("decoder.1", "encoder.1", "encoder.2")


def test_layers_without_heads_count_as_layers():
    table = scores([[1.0, 2.0], [math.nan, math.nan], [math.nan, math.nan], [3.0, math.nan]])
    assert table.top(k=1, last_layers=0.5) == HeadSet([(3, 0)])
    assert table.top(k=1, first_layers=0.5) == HeadSet([(0, 1)])
    assert table.top(k=2, last_layers=0.5) == HeadSet([(0, 1), (3, 0)])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"first_layers": 0.0}, r"`first_layers` must be in \(0, 1\], got 0.0"),
        ({"last_layers": 4}, r"`last_layers` must be in \(0, 1\], got 4"),
        ({"first_layers": 0.5, "last_layers": 0.5}, "only one of `first_layers` and `last_layers`"),
        ({"last_layers": 0.5, "per_layer": (1, 1), "k": 4}, r"`per_layer`=\(1, 1\) leaves 2 heads, but `k`=4"),
    ],
)
def test_an_end_that_cannot_be(part, message):
    with pytest.raises(ValueError, match=message):
        scores([[0.1, 0.2], [0.3, 0.4]]).top(**part)


def test_cost_aware_prefers_layers_from_which_the_backward_is_short():
    table = scores([[1.0, 0.1], [0.9, 0.1], [0.8, 0.1]])
    assert table.top(k=1) == HeadSet([(0, 0)])
    # 1.0 / 2, 0.9 / (5/3), 0.8 / (4/3)
    assert table.top(k=1, cost_aware=True) == HeadSet([(2, 0)])
    # (1.0 + 0.9) / 2, (0.9 + 0.8) / (5/3), (0.8 + 0.1) / (4/3)
    assert table.top(k=2, cost_aware=True) == HeadSet([(1, 0), (2, 0)])
    assert table.top(k=2, cost_aware=True, per_layer=(2, None)) == HeadSet([(2, 0), (2, 1)])
    with pytest.raises(ValueError, match=r"`per_layer`=\(2, 2\) takes .*, but `k`=3 .* no choice keeps to both"):
        table.top(k=3, cost_aware=True, per_layer=(2, 2))


def test_cost_aware_needs_scores_that_add_up_and_one_stack():
    with pytest.raises(ValueError, match=r"`method`='taylor' gave scores below 0 \(least -1\)"):
        scores([[1.0, -1.0]]).top(k=1, cost_aware=True)
    with pytest.raises(ValueError, match=r"`cost_aware` is for models with one stack .* cross, decoder, encoder"):
        text_to_text_scores().top(k=1, cost_aware=True)


def test_tables_are_compared_by_ranks_and_choices():
    a = scores([[0.1, 0.9, 0.8], [0.5, 0.3, math.nan]])
    b = scores([[1.0, 9.0, 3.0], [8.0, 2.0, math.nan]])
    same = a.compare(a)
    assert (same.spearman, same.overlap, same.chance, same.k) == (pytest.approx(1), 1, 0.2, 1)
    found = a.compare(b, k=2)
    assert (found.overlap, found.chance, found.k) == (0.5, 0.4, 2)
    # ranks 1, 5, 4, 3, 2 and 1, 5, 3, 4, 2
    assert found.spearman == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert a.compare(b, 0.4) == found


def test_only_tables_of_the_same_heads_are_compared():
    table = scores([[0.1, 0.9], [0.5, 0.3], [0.2, 0.8]])
    for other in (scores([[0.1, 0.9]]), scores([[0.1, 0.9], [0.5, math.nan], [0.2, 0.8]]), text_to_text_scores()):
        with pytest.raises(ValueError, match="`other` is not a table of the same heads"):
            table.compare(other)


def test_heads_of_one_group_can_be_kept_apart(tmp_path):
    values = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 5.0, math.nan, math.nan]])
    scores = HeadScores(values, "taylor", n_kv_heads=(2, 1))
    assert scores.top(k=3) == HeadSet([(0, 0), (0, 1), (0, 2)])
    assert scores.top(k=3, per_group=1) == HeadSet([(0, 0), (0, 2), (1, 1)])
    assert scores.top(k=2, per_group=1, per_layer=1) == HeadSet([(0, 0), (1, 1)])
    with pytest.raises(ValueError, match=r"`per_group`=1 leaves fewer heads than the 4 of 6 that `k`=4 asks for"):
        scores.top(k=4, per_group=1)
    with pytest.raises(ValueError, match="`per_group` must be at least 1, got 0"):
        scores.top(k=2, per_group=0)
    scores.save(tmp_path / "scores.json")
    assert HeadScores.load(tmp_path / "scores.json").n_kv_heads == (2, 1)
    # by default each head is a group of its own
    assert HeadScores(values, "taylor").top(k=3, per_group=1) == scores.top(k=3)
    for wrong in ((3, 1), (2,), (2, 0)):
        with pytest.raises(ValueError, match=r"`n_kv_heads` must be the number of key/value heads of each row"):
            HeadScores(values, "taylor", n_kv_heads=wrong)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"`HeadScores.plot` needs matplotlib: `pip install 'p2d_peft\[plots\]'`"):
        HeadScores(torch.ones(2, 2), "random").plot()
