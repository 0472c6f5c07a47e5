import pytest
import torch

from p2d_peft.heads import localize_heads

from ..tiny_models import FEW, LAYOUTS, random_batch
from .plain_gradients import gradients_by_head, table


@pytest.mark.parametrize("name", [*FEW, "gpt2"])
def test_equals_the_formula_computed_the_plain_way(name):
    model, batch = LAYOUTS[name].model(), random_batch(rows=3)
    gradients = gradients_by_head(model, batch)
    expected = {head: samples.square().sum(dim=1).mean() for head, samples in gradients.items()}
    scores = localize_heads(model, [batch], method="fisher").values
    torch.testing.assert_close(scores, table(model, expected), rtol=1e-4, atol=0)


def test_is_a_mean_over_samples():
    model, batch = LAYOUTS["llama"].model(), random_batch()
    once, twice = (localize_heads(model, [batch] * times, method="fisher").values for times in (1, 2))
    torch.testing.assert_close(twice, once)
