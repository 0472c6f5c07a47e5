import itertools
import math
from collections import Counter

import pytest
import torch

from p2d_peft.heads.choice import Bounds, best_cells, best_for_the_time, even_bound, layer_bounds, number_of_heads


def tables():
    for seed in range(3):
        values = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values[1, 3] = math.nan
        yield values


def allowed(values, count, least, most, lowest=0):
    """All choices that keep to the bounds, by trying every one."""
    cells = [cell for cell in itertools.product(range(3), range(4)) if not values[cell].isnan() and cell[0] >= lowest]
    for chosen in itertools.combinations(cells, count):
        used = [sum(cell[0] == row for cell in chosen) for row in range(3)]
        there = [sum(cell[0] == row for cell in cells) for row in range(3)]
        if all(min(least, n) <= u <= most for u, n in zip(used, there, strict=True)):
            yield chosen


def total(values, cells):
    return sum(float(values[cell]) for cell in cells)


BOUNDS = [(0, math.inf), (0, 1), (0, 2), (1, math.inf), (1, 2), (2, 2), (4, math.inf)]


@pytest.mark.parametrize("count", [1, 3, 5, 6, 11])
@pytest.mark.parametrize(("least", "most"), BOUNDS)
def test_no_choice_within_the_bounds_has_a_higher_sum(least, most, count):
    for values in tables():
        choices = list(allowed(values, count, least, most))
        found = best_cells(values, count, Bounds(least, most))
        if not choices:
            assert found is None
            continue
        assert tuple(sorted(found)) in {tuple(sorted(choice)) for choice in choices}
        assert total(values, found) == pytest.approx(max(total(values, choice) for choice in choices))


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize(("least", "most"), BOUNDS)
def test_no_choice_within_the_bounds_brings_more_for_the_time(least, most, count):
    for values in tables():
        worth = []
        for lowest in range(3):
            step = 1 + (3 - lowest) / 3
            worth += [total(values, choice) / step for choice in allowed(values, count, least, most, lowest)]
        found = best_for_the_time(values, count, Bounds(least, most))
        if not worth:
            assert found is None
            continue
        step = 1 + (3 - min(row for row, _ in found)) / 3
        assert total(values, found) / step == pytest.approx(max(worth))


@pytest.mark.parametrize("count", [1, 3, 5, 6])
@pytest.mark.parametrize(("most", "per_group"), [(math.inf, 1), (2, 1), (3, 1), (math.inf, 2)])
def test_no_choice_within_the_groups_has_a_higher_sum(most, per_group, count):
    groups = torch.tensor([[0, 0, 1, 1]] * 3)
    for values in tables():
        choices = [
            choice
            for choice in allowed(values, count, 0, most)
            if max(Counter((row, int(groups[row, head])) for row, head in choice).values()) <= per_group
        ]
        found = best_cells(values, count, Bounds(0, most, per_group, groups))
        if not choices:
            assert found is None
            continue
        assert tuple(sorted(found)) in {tuple(sorted(choice)) for choice in choices}
        assert total(values, found) == pytest.approx(max(total(values, choice) for choice in choices))


def test_of_equal_worth_the_cheaper_wins():
    assert best_for_the_time(torch.zeros(3, 2), 1, Bounds()) == [(2, 0)]


def test_numbers_and_bounds_that_contradict_are_named():
    assert [number_of_heads(None, None, 40), number_of_heads(0.5, None, 7), number_of_heads(None, 3, 7)] == [4, 4, 3]
    with pytest.raises(ValueError, match=r"as `ratio` or as `k`, not both; got 0\.1 and 3"):
        number_of_heads(0.1, 3, 40)
    for k in (0, 8):
        with pytest.raises(ValueError, match=rf"`k` must be from 1 to 7, the number of heads, got {k}"):
            number_of_heads(None, k, 7)
    assert [layer_bounds(given) for given in (None, 2, (None, 2), (1, None), (1, 2))] == [
        (0, math.inf),
        (0, 2),
        (0, 2),
        (1, math.inf),
        (1, 2),
    ]
    for bad in (0, -1, (2, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"`per_layer` must be at least 1, or a pair"):
            layer_bounds(bad)
    with pytest.raises(ValueError, match=r"or a pair \(least, most\), got \(1, 2, 3\)"):
        layer_bounds((1, 2, 3))


def test_the_even_bound_is_the_smallest_that_leaves_enough():
    for values in tables():  # layers of 4, 3 and 4 heads
        assert [even_bound(values, count) for count in range(1, 12)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
        for count in range(1, 12):
            most = even_bound(values, count)
            assert best_cells(values, count, Bounds(0, most)) is not None
            assert most == 1 or best_cells(values, count, Bounds(0, most - 1)) is None
