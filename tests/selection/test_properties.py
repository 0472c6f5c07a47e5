"""What holds for all scores, policies and budgets, and not only for those that someone thought of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2d_peft import P2DDataSelector
from p2d_peft.selection.policies import Diverse, LengthBetween, Quotas, RoundRobin
from p2d_peft.selection.pool import ranked
from p2d_peft.selection.selector import _fitting

from ..steady import steady
from ..tiny_models import tiny_model, tiny_tokenizer
from .policies.rankings import ranking


# few values, so that there are ties
scores = st.lists(st.sampled_from([0.0, 1.0, -1.0, math.nan]) | st.floats(-10, 10), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def selector():
    return P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="random")


def best(values):
    """The rows that have a score, the best first, ties by row number."""
    return sorted(
        (row for row, value in enumerate(values) if not math.isnan(value)), key=lambda row: (-values[row], row)
    )


@steady
@given(scores)
def test_ties_go_to_the_lower_row(values):
    assert ranked(torch.tensor(values, dtype=torch.float64)) == best(values)


@steady
@given(values=scores, data=st.data())
def test_as_many_rows_are_kept_as_were_asked_for(selector, values, data):
    by_share = data.draw(st.booleans())
    share = data.draw(st.floats(1e-9, 1))
    count = data.draw(st.integers(1, len(values)))
    selector.ratio, selector.num_samples = (share, None) if by_share else (None, count)
    wanted = max(1, round(share * len(values))) if by_share else count
    kept = selector.choose(torch.tensor(values, dtype=torch.float64))
    assert kept == sorted(best(values)[:wanted])
    assert len(kept) == min(wanted, len(best(values)))


@steady
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 200), st.randoms(use_true_random=False))
def test_a_budget_is_kept_and_used(lengths, budget, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    kept = _fitting(order, lengths, budget)
    assert sum(lengths[row] for row in kept) <= budget
    assert kept == [row for row in order if row in set(kept)]
    left = budget
    for row in order:  # a row is left out only where it does not fit any more
        assert (row in kept) == (lengths[row] <= left)
        left -= lengths[row] if row in kept else 0


@st.composite
def columns(draw):
    return draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))


@steady
@given(columns(), st.integers(1, 9), st.integers(1, 9))
def test_quotas_reorder_and_keep_the_order_within_a_value(column, a, b):
    shares = {"a": a / 20, "b": b / 20}
    rows = list(Quotas("task", shares)(range(len(column)), ranking(len(column), columns={"task": column})))
    assert sorted(rows) == list(range(len(column)))
    for value in "abc":
        assert [row for row in rows if column[row] == value] == [r for r in range(len(column)) if column[r] == value]


@steady
@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_quotas_hold_in_every_beginning(share, n_rows):
    column = ["a", "b"] * n_rows
    rows = Quotas("task", {"a": share})(range(2 * n_rows), ranking(2 * n_rows, columns={"task": column}))
    taken = {"a": 0, "b": 0}
    for n, row in enumerate(rows, start=1):
        taken[column[row]] += 1
        if max(taken.values()) == n_rows:  # one of them runs out
            break
        assert abs(taken["a"] - share * n) <= 0.5 + 1e-9


@steady
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 9))
def test_lengths_are_bounded_and_the_order_stays(lengths, least, more):
    most = least + more
    rows = list(LengthBetween(least, most)(range(len(lengths)), ranking(len(lengths), n_tokens=lengths)))
    assert rows == [row for row, length in enumerate(lengths) if least <= length <= most]


@steady
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 25), st.randoms(use_true_random=False))
def test_each_sample_of_the_target_takes_its_turn(n_rows, n_targets, wanted, random):
    table = [[random.choice([0.0, 0.5, random.random()]) for _ in range(n_targets)] for _ in range(n_rows)]
    order = list(range(n_rows))
    random.shuffle(order)
    rows = list(RoundRobin()(order, ranking(n_rows, wanted=wanted, per_target=torch.tensor(table))))
    there, expected = set(order), []
    for turn in range(min(wanted, n_rows)):
        values = [float(value) for value in torch.tensor([row[turn % n_targets] for row in table])]
        expected.append(min(there, key=lambda row: (-values[row], row)))
        there.remove(expected[-1])
    assert rows == expected + [row for row in order if row in there]


@steady
@given(st.integers(1, 20), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**31))
def test_diversity_reorders_and_without_weight_does_nothing(n_rows, wanted, weight, seed):
    features = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(seed))
    rows = list(Diverse(weight)(range(n_rows), ranking(n_rows, wanted=wanted, features=features)))
    assert sorted(rows) == list(range(n_rows)) and rows[0] == 0
    if not weight:
        assert rows == list(range(n_rows))
