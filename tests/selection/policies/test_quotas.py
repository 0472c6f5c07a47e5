import random
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset

from p2d_peft.selection.policies import Quotas

from .rankings import ranking


def ordered(values, shares, wanted=None, rows=None):
    given = ranking(len(values), wanted or len(values), columns={"source": values})
    return list(Quotas("source", shares)(range(len(values)) if rows is None else rows, given))


def drawn(n, **shares):
    return random.Random(0).choices(list(shares), list(shares.values()), k=n)


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.5}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 0.3, "b": 1 / 3}])
def test_every_beginning_follows_the_shares(shares):
    values = drawn(3000, a=8, b=4, c=4)
    order = ordered(values, shares)
    expected = {"c": 1 - sum(shares.values())} | shares if "c" not in shares else shares
    counts = Counter()
    for length, row in enumerate(order[:500], start=1):
        counts[values[row]] += 1
        for value, share in expected.items():
            assert abs(counts[value] - share * length) <= 1, (length, value)


def test_within_a_value_the_order_stays_and_ties_go_to_the_better_row():
    values = ["b", "b", "a", "a", "a", "b"]
    assert ordered(values, {"a": 0.5, "b": 0.5}) == [0, 2, 1, 3, 4, 5]
    assert ordered(values, {"a": 0.5, "b": 0.5}, rows=[4, 3, 2, 1, 0, 5]) == [4, 1, 3, 0, 2, 5]


def test_the_order_of_the_shares_decides_nothing():
    values = drawn(400, a=1, b=1, c=1, d=1)
    shares = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert ordered(values, shares) == ordered(values, dict(reversed(shares.items())))


def test_values_that_are_not_named_share_the_rest_or_are_dropped():
    values = ["a", "x", "y", "x", "a", "y", "a", "a"]
    assert ordered(values, {"a": 0.5}) == [0, 1, 2, 4, 3, 6, 5, 7]
    assert ordered(values, {"a": 1.0}, wanted=4) == [0, 4, 6, 7]
    tenths = {str(value): 0.1 for value in range(10)}  # in floating point a little less than 1
    assert ordered(["x", *tenths], tenths) == list(range(1, 11))


def test_a_value_that_runs_out_leaves_its_place_to_the_others(caplog):
    values = ["a"] * 3 + ["b"] * 30 + ["c"] * 30
    with caplog.at_level("WARNING", logger="p2d_peft"):
        order = ordered(values, {"a": 0.4, "b": 0.4, "c": 0.2}, wanted=33)
    counts = Counter(values[row] for row in order[:33])
    assert counts == {"a": 3, "b": 20, "c": 10}
    assert sorted(order) == list(range(63))
    assert "'a' in column 'source' ran out after 3 rows" in caplog.text
    assert "'b'" not in caplog.text  # behind what is wanted it is no news


def test_no_warning_where_no_value_runs_out(caplog):
    with caplog.at_level("WARNING", logger="p2d_peft"):
        ordered(["a", "b"] * 10, {"a": 0.5, "b": 0.5}, wanted=10)
    assert not caplog.text


def test_rows_are_read_only_as_far_as_they_are_asked_for():
    values, read = ["a", "b"] * 1000, []
    rows = Quotas("source", {"a": 0.5, "b": 0.5})(
        (read.append(row) or row for row in range(2000)), ranking(2000, 10, columns={"source": values})
    )
    assert [next(rows) for _ in range(10)] == list(range(10))
    assert len(read) <= 12


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "`shares` must name at least one value"),
        ({"a": 0.0}, "`shares` must be above 0, got 0.0 for 'a'"),
        ({"a": -0.5, "b": 0.5}, "`shares` must be above 0, got -0.5 for 'a'"),
        ({"a": float("nan")}, "`shares` must be above 0, got nan for 'a'"),
        ({"a": 0.7, "b": 0.7}, "`shares` must be at most 1 together, got 1.4"),
    ],
)
def test_bad_shares_are_named(shares, message):
    with pytest.raises(ValueError, match=message):
        Quotas("source", shares)


def test_a_column_of_lists_is_refused_before_anything_is_scored():
    quotas, values = Quotas("source", {"a": 0.5}), [None, ["a"], ["b"]]
    message = r"`column` must be one of single values, .* but 'source' holds a list: \['a'\]"
    with pytest.raises(ValueError, match=message):
        quotas.check(Dataset.from_dict({"source": values}))
    with pytest.raises(ValueError, match=message):  # of a stream
        ordered(values, quotas.shares)
    quotas.check(Dataset.from_dict({"source": ["a", None]}))


def test_a_value_that_no_row_has_is_refused_before_anything_is_scored():
    pool = Dataset.from_dict({"source": ["math", "code"], "label": [0, 1]})
    message = (
        r"`shares` names 'maths', but no row of `pool` has that in the column 'source'. Its values are \['math', 'co"
    )
    with pytest.raises(ValueError, match=message):
        Quotas("source", {"code": 0.5, "maths": 0.5}).check(pool)
    pool = pool.cast_column("label", ClassLabel(names=["no", "yes"]))
    with pytest.raises(ValueError, match=r"Its values are \[0, 1\]\. They stand for \['no', 'yes'\]\."):
        Quotas("label", {"yes": 1.0}).check(pool)
    Quotas("label", {1: 1.0}).check(pool)


def test_a_value_that_runs_out_behind_a_full_budget_of_tokens_is_not_told(caplog):
    values = ["a"] * 2 + ["b"] * 8
    for max_tokens, told in ((50, False), (60, True)):
        caplog.clear()
        given = ranking(10, 10, n_tokens=[10] * 10, columns={"source": values}, max_tokens=max_tokens)
        with caplog.at_level("WARNING", logger="p2d_peft"):
            list(Quotas("source", {"a": 0.5, "b": 0.5})(range(10), given))
        assert ("'a' in column 'source' ran out after 2 rows" in caplog.text) == told
