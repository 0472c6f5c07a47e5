import pytest
import torch
from torch.nn import functional

from p2d_peft.selection.policies import Diverse
from p2d_peft.selection.policies.diverse import CANDIDATES

from .rankings import ranking


def by_definition(features, weight):
    """All pairs, and a search through what is left at every step."""
    likeness = functional.cosine_similarity(features[:, None], features[None], dim=-1)
    left, picked, n = list(range(len(features))), [], len(features)
    while left:

        def worth(row):
            nearest = max((likeness[row, other].item() for other in picked), default=0)
            return (1 - weight) * (1 - row / (n - 1)) - weight * nearest

        picked.append(max(left, key=worth))
        left.remove(picked[-1])
    return picked


@pytest.mark.parametrize("weight", [0, 0.2, 0.5, 0.9])
def test_equals_the_definition(weight):
    features = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    given = ranking(24, 6, features=features)
    assert list(Diverse(weight)(range(24), given)) == by_definition(features, weight)


def test_a_copy_of_the_best_row_goes_behind_what_is_new():
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])
    assert list(Diverse()(range(4), ranking(4, 2, features=features))) == [0, 2, 1, 3]


def test_the_features_of_a_few_times_the_wanted_rows_are_read_once_and_the_others_follow():
    asked, n_rows = [], 100
    features = torch.randn(n_rows, 4)
    rows = list(reversed(range(n_rows)))
    found = list(Diverse()(rows, ranking(n_rows, 5, features=features, asked=asked)))
    assert asked == [rows[: 5 * CANDIDATES]]
    assert found[5 * CANDIDATES :] == rows[5 * CANDIDATES :]
    assert sorted(found) == sorted(rows)
    assert list(Diverse()([], ranking(features=features))) == []


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_bad_weights_are_named(weight):
    with pytest.raises(ValueError, match=r"`weight` must be in \[0, 1\], got"):
        Diverse(weight)


def test_with_a_budget_of_tokens_the_candidates_are_those_that_fill_it_a_few_times():
    asked, lengths = [], [10, 1, 1, 3] * 25
    given = ranking(100, 99, n_tokens=lengths, features=torch.randn(100, 4), asked=asked, max_tokens=15)
    list(Diverse()(range(100), given))
    assert asked == [list(range(16))]  # 4 * 15 tokens
