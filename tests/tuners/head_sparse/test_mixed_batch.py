import pytest
import torch

from p2d_peft.tuners import HeadSparseConfig
from p2d_peft.tuners.head_sparse import WeightSlice
from tests.tiny_models import random_batch, tiny_model
from tests.tuners.head_sparse.test_layer import bits, make_layer
from tests.tuners.head_sparse.test_model import attach, logits, randomize


NAMES = ["__base__", "default", "other", "default", "__base__", "other"]


@pytest.fixture
def model():
    model = randomize(attach(tiny_model()), std=0.2)
    model.add_adapter("other", HeadSparseConfig(heads={0: [1, 2], 1: [0]}, r=2, init_weights=False))
    return model.eval()


def one_by_one(model, run):
    """The rows of a batch, each taken from a run of the whole batch with its own adapter."""
    results = {}
    for name in set(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results[name] = run()
        else:
            model.set_adapter(name)
            results[name] = run()
    return [results[name][row] for row, name in enumerate(NAMES)]


def test_forward(model):
    batch = random_batch(rows=len(NAMES))
    mixed = logits(model, **batch, adapter_names=NAMES)
    expected = one_by_one(model, lambda: logits(model, **batch))
    assert len({tuple(row.flatten().tolist()) for row in expected}) == len(NAMES)
    for row, (result, alone) in enumerate(zip(mixed, expected, strict=True)):
        torch.testing.assert_close(result, alone, atol=1e-5, rtol=1e-4)
        if NAMES[row] == "__base__":
            assert torch.equal(bits(result), bits(alone))
    # the hooks are gone
    model.set_adapter("default")
    assert torch.equal(logits(model, **batch)[1], expected[1])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(model, num_beams):
    batch = random_batch(rows=len(NAMES))
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "num_beams": num_beams}
    arguments.update(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    mixed = model.generate(**arguments, adapter_names=NAMES)
    expected = one_by_one(model, lambda: model.generate(**arguments))
    assert torch.equal(mixed, torch.stack(expected))
    assert len({tuple(row) for row in mixed[:, -5:].tolist()}) > 3


def test_modules_to_save_of_each_row(model):
    model = attach(tiny_model(), modules_to_save=["lm_head"])
    model.add_adapter("other", HeadSparseConfig(heads=[0], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.mul_(2)
    batch = random_batch(rows=len(NAMES))
    mixed = logits(model.eval(), **batch, adapter_names=NAMES)
    for result, alone in zip(mixed, one_by_one(model, lambda: logits(model, **batch)), strict=True):
        torch.testing.assert_close(result, alone, atol=1e-5, rtol=1e-4)


def test_what_cannot_be(model):
    batch = random_batch(rows=2)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): defualt"):
        logits(model, **batch, adapter_names=["defualt", "other"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 2"):
        logits(model, **batch, adapter_names=["default", "other", "other"])
    with pytest.raises(ValueError, match="in training mode"):
        logits(model.train(), **batch, adapter_names=["default", "other"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        logits(model, **batch, adapter_names=["default", "other"])
    model.unmerge_adapter()
    # no hook is left behind by the errors
    assert not any(module._forward_pre_hooks for module in model.modules())
    logits(model, **batch, adapter_names=["default", "other"])


def test_an_adapter_of_other_layers_leaves_a_layer_alone():
    layer = make_layer(WeightSlice(0, (1, 2)))
    x = torch.randn(3, 4, 12)
    mixed = layer(x, adapter_names=["__base__", "default", "elsewhere"])
    assert torch.equal(mixed[[0, 2]], layer.base_layer(x)[[0, 2]])
    torch.testing.assert_close(mixed[1], layer(x)[1])
