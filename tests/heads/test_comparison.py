import math

import pytest
import torch

from p2d_peft.heads.comparison import spearman


def test_without_ties_it_is_the_formula_with_squared_differences():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(9, generator=generator), torch.rand(9, generator=generator)
    differences = a.argsort().argsort() - b.argsort().argsort()
    assert spearman(a, b) == pytest.approx(1 - 6 * float(differences.square().sum()) / (9 * 80))


def test_equal_values_share_the_mean_of_their_ranks():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert spearman(torch.tensor([1.0, 5, 5, 9]), torch.tensor([0.0, 1, 2, 3])) == pytest.approx(4.5 / math.sqrt(22.5))


def test_only_the_order_counts():
    values = torch.rand(20, generator=torch.Generator().manual_seed(1))
    assert spearman(values, values.exp()) == pytest.approx(1) and spearman(values, -values) == pytest.approx(-1)
    assert math.isnan(spearman(values, torch.ones(20)))
