import pytest
import torch

from p2d_peft.heads import localize_heads

from ..tiny_models import FEW, LAYOUTS, random_batch, tiny_model
from .plain_gradients import gradients_by_head, table


@pytest.mark.parametrize("name", [*FEW, "gpt2"])
def test_equals_the_formula_computed_the_plain_way(name):
    model, batch = LAYOUTS[name].model(), random_batch(rows=4)

    def signal_to_noise(samples):
        mean = samples.mean(dim=0)
        return mean.square().sum() / (samples - mean).square().sum(dim=1).mean()

    expected = {head: signal_to_noise(samples) for head, samples in gradients_by_head(model, batch).items()}
    scores = localize_heads(model, [batch], method="agreement").values
    torch.testing.assert_close(scores, table(model, expected), rtol=1e-3, atol=0)


def test_a_head_without_a_gradient_scores_nothing():
    model = tiny_model("llama-mha-bias")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for parameter in (attention.v_proj.weight, attention.v_proj.bias, attention.o_proj.weight.T):
            parameter[24:36] = 0  # head 2 of 4, D = 12
    scores = localize_heads(model, [random_batch()], method="agreement").values
    assert scores[1, 2] == 0 and (scores > 0).sum() == 11


def test_needs_samples_that_differ():
    one = random_batch(rows=1)
    with pytest.raises(ValueError, match=r"'agreement' .* holds one with a token that counts; give at least two"):
        localize_heads(tiny_model(), [one], method="agreement")
    with pytest.raises(ValueError, match="those of all samples in `batches` are the same; give samples that differ"):
        localize_heads(tiny_model(), [one, one, one], method="agreement")
