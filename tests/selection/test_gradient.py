import pytest
import torch
from torch.nn import functional

from p2d_peft.heads import HeadSet, ModelGeometry
from p2d_peft.selection import gradient

from ..tiny_data import prompt_completion
from ..tiny_models import LAYOUTS, tiny_model
from .direct import samples_of, scored
from .test_head_gradients import HEADS, by_autograd


TARGET = samples_of(prompt_completion(4, seed=1))


def whole(model, heads, samples):
    (_, batch), *_ = samples.batches(1000, torch.device("cpu"))
    order = sorted(range(len(samples)), key=lambda index: -len(samples.input_ids[index]))
    found = torch.empty(0)
    for index, row in zip(order, by_autograd(model, heads, batch), strict=True):
        found = found if len(found) else torch.empty(len(samples), len(row))
        found[index] = row
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_is_the_cosine_with_the_targets_mean_gradient(name, monkeypatch):
    for size in ("PROJECTED_ROWS", "PROJECTED_COLUMNS"):
        monkeypatch.setattr(gradient, size, 10_000)  # no projection
    samples = samples_of()
    got = scored(gradient.SCORER, LAYOUTS[name].model(), samples, heads=HEADS, target=TARGET)
    pool, target = (whole(LAYOUTS[name].model(), HEADS, part) for part in (samples, TARGET))
    expected = functional.cosine_similarity(pool, target.mean(0, keepdim=True))
    torch.testing.assert_close(got.scores, expected, rtol=1e-3, atol=1e-4)
    each = functional.cosine_similarity(pool[:, None], target[None], dim=2)
    torch.testing.assert_close(got.per_target, each, rtol=1e-3, atol=1e-4)


def test_projected_scores_rank_as_whole_ones_do(monkeypatch):
    model = tiny_model(hidden_size=96)
    args = {"samples": samples_of(prompt_completion(48)), "heads": ModelGeometry.of(model).heads, "target": TARGET}
    projected = scored(gradient.SCORER, model, **args)
    for size in ("PROJECTED_ROWS", "PROJECTED_COLUMNS"):
        monkeypatch.setattr(gradient, size, 10_000)
    exact = scored(gradient.SCORER, model, **args)
    assert torch.corrcoef(torch.stack([projected.scores, exact.scores]))[0, 1] > 0.95
    assert projected.features.shape == (48, 12 * 16 * 16) and exact.features.shape[1] > 10 * 12 * 16 * 16


def test_looks_at_nothing_but_the_selected_heads_gradients():
    """A step along a sample's own gradient is what it would be itself; another head has another opinion."""
    samples = samples_of()
    scores = [
        scored(gradient.SCORER, tiny_model(), samples, heads=HeadSet([head]), target=samples.subset([3])).scores
        for head in ((0, 0), (2, 3))
    ]
    for found in scores:
        assert found.argmax() == 3 and found[3] == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(*scores, atol=0.05)
