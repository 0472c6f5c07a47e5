import pytest
import torch

from p2d_peft.heads import ModelGeometry, localize_heads
from p2d_peft.heads.gates import gated
from p2d_peft.heads.samples import sample_losses

from ..tiny_models import LAYOUTS, random_batch, tiny_model
from .plain_gradients import heads_of, mean_loss, slices, table


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3", "gpt2"])
def test_is_the_change_of_the_loss_without_the_output_projections_columns(name):
    batch = random_batch(rows=3)
    model = LAYOUTS[name].model()
    before, expected = mean_loss(model, batch), {}
    for head in heads_of(model):
        ablated = LAYOUTS[name].model()
        weight, part = slices(ablated, *head)[3]
        with torch.no_grad():
            weight[part] = 0
        expected[head] = torch.tensor(mean_loss(ablated, batch) - before, dtype=torch.float64)
    scores = localize_heads(model, [batch], method="ablation").values
    torch.testing.assert_close(scores, table(model, expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3-next", "deepseek-v3", "phi3"])
def test_is_the_difference_of_the_loss_from_gate_1_to_gate_0(name):
    model, batch = LAYOUTS[name].model(), random_batch(rows=2)
    scores = localize_heads(model, [batch], method="ablation").values
    geometry = ModelGeometry.of(model)
    with torch.no_grad():
        whole = sample_losses(model, batch).double()
        for layer, head in geometry.heads:
            gates = {other: torch.ones(2, attention.n_heads) for other, attention in geometry.items()}
            gates[layer][:, head] = 0
            with gated(model, geometry, gates):
                assert (sample_losses(model, batch).double() - whole).sum() / 2 == scores[layer, head]


def test_a_head_whose_output_is_thrown_away_scores_nothing():
    model = tiny_model("llama-mha-bias")
    model.model.layers[1].self_attn.o_proj.weight.data[:, 24:36] = 0  # head 2 of 4, D = 12
    scores = localize_heads(model, [random_batch()], method="ablation").values
    assert scores[1, 2] == 0 and (scores != 0).sum() == 11
