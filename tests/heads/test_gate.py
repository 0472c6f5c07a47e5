import pytest
import torch

from p2d_peft.heads import ModelGeometry, localize_heads
from p2d_peft.heads.gate import gate_gradients
from p2d_peft.heads.gates import gated

from ..tiny_models import LAYOUTS, random_batch
from .plain_gradients import mean_loss


# GPT-2, GPT-NeoX, BLOOM and OPT compute in double precision throughout; the others' norms or routers are in float32
EXACT = ("gpt2", "gpt-neox", "bloom", "opt")
STEP = 1e-2


@pytest.mark.parametrize("name", [*EXACT, "llama", "qwen3", "phi3", "qwen3-next", "deepseek-v3", "falcon-gqa"])
def test_the_signed_gradient_is_the_finite_difference_of_the_loss(name):
    model = LAYOUTS[name].model().double().requires_grad_(False)
    model.set_experts_implementation("eager")  # the fused one knows no double precision
    geometry, batch = ModelGeometry.of(model), random_batch(rows=1)
    (gradients,) = gate_gradients(model, geometry, batch)
    for layer, attention in geometry.items():
        for head in (0, attention.n_heads - 1):
            around = []
            for sign in (-1, 1):
                gates = torch.ones(1, attention.n_heads, dtype=torch.float64)
                gates[0, head] += sign * STEP
                with gated(model, geometry, {layer: gates}):
                    around.append(mean_loss(model, batch))
            difference = (around[1] - around[0]) / (2 * STEP)
            assert abs(difference) > 1e-5
            # the difference itself is wrong by the third derivative times STEP^2 / 6
            relative, absolute = (1e-3, 1e-7) if name in EXACT else (1e-2, 2e-5)
            assert float(gradients[layer][head]) == pytest.approx(difference, rel=relative, abs=absolute)


def test_the_score_is_the_mean_of_the_samples_absolute_gradients():
    model, samples = LAYOUTS["llama"].model(), [random_batch(rows=1, seed=seed) for seed in (1, 2)]
    both = localize_heads(model, samples, method="gate").values
    model.requires_grad_(False)
    geometry = ModelGeometry.of(model)
    signed = [gate_gradients(model, geometry, sample)[0] for sample in samples]
    assert any(((signed[0][layer] * signed[1][layer]) < 0).any() for layer in geometry)
    expected = torch.stack([(signed[0][layer].abs() + signed[1][layer].abs()) / 2 for layer in geometry])
    torch.testing.assert_close(both, expected)
