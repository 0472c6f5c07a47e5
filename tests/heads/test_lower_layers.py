import pytest
import torch

from p2d_peft.heads import ModelGeometry, localize_heads, lower_layers
from p2d_peft.heads.lower_layers import LowerLayers
from p2d_peft.heads.samples import right_padded, rows_of, sample_losses

from ..model_checks import assert_unchanged, snapshot
from ..tiny_models import ARCHITECTURES, LAYOUTS, random_batch, tiny_model


CAUSAL = [name for name in LAYOUTS if (LAYOUTS[name].auto, LAYOUTS[name].inputs) == ("AutoModelForCausalLM", "text")]


def deeper(name):
    """A model with a layer below one that has layers below, where the architecture says how."""
    return tiny_model(name, num_hidden_layers=4) if name in ARCHITECTURES else LAYOUTS[name].model()


def a_batch(model, seed=0):
    return right_padded(rows_of(random_batch(rows=3, seed=seed), model))


def passes_of(model):
    """How often each layer of a Llama runs."""
    counts = [0] * len(model.model.layers)

    def count(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    # on a part of the layer: a layer that is passed over is called as well
    handles = [layer.mlp.register_forward_pre_hook(count(index)) for index, layer in enumerate(model.model.layers)]
    return counts, handles


@pytest.mark.parametrize("method", ["trained", "ablation"])
@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bart"])
def test_scores_are_those_of_whole_passes(name, method, monkeypatch):
    batch = random_batch(rows=4, padding=2)
    kept = localize_heads(deeper(name), [batch], method=method).values
    monkeypatch.setattr(lower_layers, "_layers_below", lambda model, attention: [])
    whole = localize_heads(deeper(name), [batch], method=method).values
    assert torch.equal(kept.nan_to_num(), whole.nan_to_num())


def test_layers_below_run_once_for_each_batch():
    model = tiny_model(num_hidden_layers=4).eval()
    batches = [a_batch(model, seed) for seed in range(2)]
    expected = [sample_losses(model, batch) for batch in batches]
    lower = LowerLayers(model, ModelGeometry.of(model)[2], batches[0])
    counts, handles = passes_of(model)
    for _ in range(3):
        for batch, losses in zip(batches, expected, strict=True):
            with lower.kept(batch):
                assert torch.equal(sample_losses(model, batch), losses)
    for handle in handles:
        handle.remove()
    assert counts == [1, 1, 6, 6]  # that of the first batch was when it was tried


def test_gradients_are_those_of_whole_passes():
    model = tiny_model(num_hidden_layers=3).eval()
    batch, weight = a_batch(model), model.model.layers[2].self_attn.q_proj.weight
    expected = torch.autograd.grad(sample_losses(model, batch).sum(), weight)[0]
    lower = LowerLayers(model, ModelGeometry.of(model)[2], batch)
    for _ in range(2):
        with lower.kept(batch):
            losses = sample_losses(model, batch)
        assert torch.equal(torch.autograd.grad(losses.sum(), weight)[0], expected)


def test_the_first_layer_has_none_below():
    model = tiny_model().eval()
    lower = LowerLayers(model, ModelGeometry.of(model)[0], a_batch(model))
    assert not lower._below


class Shared(dict):
    """What layers hand on beside their output."""


def test_a_weight_that_a_layer_below_has_as_well_is_trained_in_both(monkeypatch):
    def model():
        tied = tiny_model(num_hidden_layers=3)
        tied.model.layers[2].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
        return tied

    batch = random_batch(rows=4)
    kept = localize_heads(model(), [batch], method="trained").values
    monkeypatch.setattr(lower_layers, "_layers_below", lambda model, attention: [])
    assert torch.equal(kept, localize_heads(model(), [batch], method="trained").values)


def test_what_a_layer_leaves_behind_is_of_another_batch_then(monkeypatch):
    def model():
        made, left = tiny_model(num_hidden_layers=3), {}
        made.model.layers[0].register_forward_hook(lambda module, args, output: left.update(it=output))
        made.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output + left["it"])
        return made

    batches = [random_batch(rows=2, seed=seed) for seed in range(2)]
    kept = localize_heads(model(), batches, method="trained").values
    monkeypatch.setattr(lower_layers, "_layers_below", lambda model, attention: [])
    assert torch.equal(kept, localize_heads(model(), batches, method="trained").values)


@pytest.mark.parametrize("fault", ["an error", "another output", "one module twice"])
def test_a_model_that_wants_more_of_its_layers_is_run_whole(fault):
    model = tiny_model(num_hidden_layers=3).eval()
    first, _, last = model.model.layers
    shared = Shared()
    if fault == "one module twice":
        model.model.layers[1] = first
    else:
        first.mlp.register_forward_hook(lambda module, args, output: shared.update(of_first=output))

        def use(module, args, output):
            return output + (shared.pop("of_first") if fault == "an error" else shared.pop("of_first", 0))

        last.mlp.register_forward_hook(use)
    batch = a_batch(model)
    whole = sample_losses(model, batch)
    lower = LowerLayers(model, ModelGeometry.of(model)[2], batch)
    for _ in range(2):
        with lower.kept(batch):
            assert torch.equal(sample_losses(model, batch), whole)


def test_layers_are_put_back_after_an_exception():
    model = tiny_model(num_hidden_layers=3).eval()
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as Accelerate's hooks do
    forwards = [dict(layer.__dict__).get("forward") for layer in model.model.layers]
    before, batch = snapshot(model), a_batch(model)
    lower = LowerLayers(model, ModelGeometry.of(model)[2], batch)
    for other in (batch, a_batch(model, 1)):
        with pytest.raises(RuntimeError, match="on purpose"), lower.kept(other):
            assert (model.model.layers[1].__dict__.get("forward") is None) == (other is not batch)
            raise RuntimeError("on purpose")
    assert forwards == [dict(layer.__dict__).get("forward") for layer in model.model.layers]
    assert_unchanged(model, before)
