import pytest
import torch

from p2d_peft.heads import ModelGeometry
from p2d_peft.heads.gradients import mean_gradients, sample_gradients
from p2d_peft.heads.weights import attention_weights

from ..tiny_models import LAYOUTS, random_batch, tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_samples_gradients_are_those_it_has_alone(name):
    model, batch = LAYOUTS[name].model(), random_batch(rows=3, padding=4)
    weights = attention_weights(model, ModelGeometry.of(model), "taylor")
    samples = list(sample_gradients(model, weights, [batch]))
    last = {key: value[2:, :7] for key, value in batch.items()}
    model.requires_grad_(True)
    model(**last).loss.backward()
    for module, gradient in samples[2].items():
        torch.testing.assert_close(gradient, weights[module].as_linear(weights[module].parameter.grad))
    means = mean_gradients(model, weights, [batch])
    for module, mean in means.items():
        torch.testing.assert_close(mean, torch.stack([sample[module] for sample in samples]).mean(dim=0))


def test_gradients_of_bf16_weights_are_added_up_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    weights = attention_weights(model, ModelGeometry.of(model), "taylor")
    (gradients,) = sample_gradients(model, weights, [random_batch(rows=1)])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
