import pytest
import torch

from p2d_peft.heads import localize_heads

from ..tiny_models import FEW, LAYOUTS, random_batch
from .plain_gradients import gradients_by_head, mean_loss, slices, table


RATE = {"gain": 1e-5, "gain_sgd": 1e-3}


@pytest.mark.parametrize("method", RATE)
@pytest.mark.parametrize("name", [*FEW, "gpt2"])
def test_equals_the_formula_computed_the_plain_way(name, method):
    model, batch = LAYOUTS[name].model(), random_batch(rows=3)
    means = {head: samples.mean(dim=0) for head, samples in gradients_by_head(model, batch).items()}
    expected = {head: mean.abs().sum() if method == "gain" else mean.square().sum() for head, mean in means.items()}
    scores = localize_heads(model, [batch], method=method).values
    torch.testing.assert_close(scores, table(model, expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", RATE)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_what_a_first_step_on_the_slices_brings(name, method):
    """A step with torch's own optimizer on the slices of one head, others held, in double precision."""
    batch = random_batch(rows=3)
    scores = localize_heads(LAYOUTS[name].model().double(), [batch], method=method).values
    for head in [(0, 1), (1, 3)]:
        model = LAYOUTS[name].model().double()
        before = mean_loss(model, batch)
        for row in range(3):
            (model(**{key: value[row : row + 1] for key, value in batch.items()}).loss / 3).backward()
        parts = slices(model, *head)
        own = [torch.nn.Parameter(weight.detach()[part].clone()) for weight, part in parts]
        for parameter, (weight, part) in zip(own, parts, strict=True):
            parameter.grad = weight.grad[part].clone()
        if method == "gain":
            torch.optim.AdamW(own, lr=RATE[method], weight_decay=0.0, eps=0.0).step()
        else:
            torch.optim.SGD(own, lr=RATE[method]).step()
        with torch.no_grad():
            for parameter, (weight, part) in zip(own, parts, strict=True):
                weight[part] = parameter
        assert before - mean_loss(model, batch) == pytest.approx(RATE[method] * float(scores[head]), rel=2e-2)


@pytest.mark.parametrize("method", RATE)
def test_samples_that_pull_in_opposite_directions_cancel(method):
    """Unlike with `taylor` and `fisher`, the score of two samples is at most the mean of theirs."""
    model, samples = LAYOUTS["llama"].model(), [random_batch(rows=1, seed=seed) for seed in (1, 2)]
    alone = [localize_heads(model, [sample], method=method).values for sample in samples]
    both = localize_heads(model, samples, method=method).values
    assert (both < (alone[0] + alone[1]) / 2).all()
