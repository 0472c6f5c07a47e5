import pytest
import torch

from p2d_peft.heads import localize_heads

from ..tiny_models import FEW, random_batch, tiny_model


@pytest.mark.parametrize("name", FEW)
def test_equals_the_formula_computed_the_plain_way(name):
    """Against loss.backward() sample by sample and explicit index arithmetic, in place of the geometry."""
    model, batch = tiny_model(name), random_batch(rows=3)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    expected = torch.zeros(config.num_hidden_layers, config.num_attention_heads, dtype=torch.float64)
    for row in range(3):
        model.zero_grad()
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for layer, block in enumerate(model.model.layers):
            for head in range(config.num_attention_heads):
                own = slice(head * head_dim, (head + 1) * head_dim)
                shared = slice(head // per_group * head_dim, (head // per_group + 1) * head_dim)
                for projection, part in (("q", own), ("k", shared), ("v", shared)):
                    weight = getattr(block.self_attn, f"{projection}_proj").weight
                    expected[layer, head] += (weight.grad * weight)[part].abs().sum().double()
                weight = block.self_attn.o_proj.weight
                expected[layer, head] += (weight.grad * weight)[:, own].abs().sum().double()
    scores = localize_heads(tiny_model(name), [batch], method="taylor")
    torch.testing.assert_close(scores.values, expected.detach(), rtol=1e-4, atol=1e-7)


def test_does_not_depend_on_how_samples_are_batched_or_padded():
    batch = random_batch(rows=4, padding=4)
    together = localize_heads(tiny_model(), [batch], method="taylor").values
    one_by_one = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    torch.testing.assert_close(localize_heads(tiny_model(), one_by_one, method="taylor").values, together)


def test_opposite_samples_do_not_cancel():
    """Sums of absolute values: adding a sample can only add to a score."""
    first, second = random_batch(rows=1, seed=1), random_batch(rows=1, seed=2)
    alone = localize_heads(tiny_model(), [first], method="taylor").values
    both = localize_heads(tiny_model(), [first, second], method="taylor").values
    assert (both > alone).all()
