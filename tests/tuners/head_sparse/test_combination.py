import pytest
import torch

from p2d_peft.heads import HeadSet
from p2d_peft.tuners import HeadSparseConfig, HeadSparseLayer
from tests.tiny_models import tiny_model
from tests.tuners.head_sparse.test_layer import bits
from tests.tuners.head_sparse.test_model import attach, layers_of, logits, randomize


# of different groups of the tiny model's two: no row and no column in common
ONE, OTHER = HeadSet([(0, 0), (2, 1)]), HeadSet([(0, 2), (1, 3)])


def model_with(one, other, dtype=torch.float32):
    model = randomize(attach(tiny_model(dtype=dtype), **one))
    model.add_adapter("other", HeadSparseConfig(**other, init_weights=False))
    return randomize(model, "other") if "r" not in other else model


def dense(model, name):
    """The delta of an adapter in each module, as a dense matrix."""
    return {
        key: layer.get_delta_weight(name).detach()
        for key, layer in model.get_base_model().named_modules()
        if isinstance(layer, HeadSparseLayer) and name in layer.head_sparse_slice
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_on_disjoint_heads_combine_exactly(dtype):
    """Each part of the sum is one adapter's own delta, and the merged weights are the same in each bit."""
    model = model_with({"heads": ONE}, {"heads": OTHER}, dtype)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    assert HeadSet.from_layers(model.peft_config["both"].heads) == ONE | OTHER
    one, other, both = (dense(model, name) for name in ("default", "other", "both"))
    assert both.keys() == one.keys() | other.keys()
    for key, delta in both.items():
        parts = [part[key] for part in (one, other) if key in part]
        assert sum((part != 0).int() for part in parts).max() == 1  # no interference
        assert torch.equal(bits(delta), bits(sum(parts)))
        for part in parts:
            assert torch.equal(delta[part != 0], part[part != 0])

    model.base_model.merge_adapter(["default", "other"])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    model.unmerge_adapter()
    model.base_model.merge_adapter(["both"])
    for name, tensor in expected.items():
        assert torch.equal(bits(tensor), bits(model.state_dict()[name])), name


def test_overlapping_adapters_add_up_with_their_weights():
    model = model_with({"heads": [0, 1]}, {"heads": {0: [1, 2], 1: [3]}, "r": 2})
    model.add_weighted_adapter(["default", "other"], [2.0, -0.5], "both")
    one, other, both = (dense(model, name) for name in ("default", "other", "both"))
    for key, delta in both.items():
        expected = 2.0 * one.get(key, torch.zeros_like(delta)) - 0.5 * other.get(key, torch.zeros_like(delta))
        torch.testing.assert_close(delta, expected, atol=1e-7, rtol=1e-6)
    assert model.peft_config["both"].r is None
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))


def test_it_is_an_adapter_like_any_other(tmp_path):
    model = model_with({"heads": ONE, "layers_to_transform": [0]}, {"heads": OTHER, "projections": ["v", "o"]})
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both")
    model.set_adapter("both")
    expected = logits(model)
    assert model.peft_config["both"].heads == {0: [0, 2], 1: [3]}  # not (2, 1), which the layers leave out
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = attach(tiny_model(), heads=ONE)
    loaded.load_adapter(tmp_path / "both", "both")
    loaded.set_adapter("both")
    assert torch.equal(bits(logits(loaded)), bits(expected))
    model.delete_adapter("both")
    assert all("both" not in layer.head_sparse_delta for layer in layers_of(model))


@pytest.mark.parametrize(
    ("arguments", "other", "message"),
    [
        ((["default", "no"], [1, 1]), {}, "has 'no', which does not exist; there are: default, other"),
        ((["default", "other"], [1]), {}, "got 1 for 2 adapters"),
        (([], []), {}, "got 0 for 0 adapters"),
        ((["default", "other"], [1, 1]), {"modules_to_save": ["lm_head"]}, "'other' trains more than heads"),
        ((["default", "other"], [1, 1]), {"trainable_token_indices": [1]}, "'other' trains more than heads"),
        ((["default", "other"], [1, 1]), {"target_modules": ["q_proj"]}, "differ in `target_modules`"),
    ],
)
def test_what_cannot_be_combined(arguments, other, message):
    model = model_with({"heads": ONE}, {"heads": OTHER, **other})
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments, "both")
    assert list(model.peft_config) == ["default", "other"]


def test_no_random_deltas_where_no_adapter_has_any():
    model = model_with(
        {"heads": {0: [1]}, "projections": ["q"]},
        {"heads": {1: [1]}, "projections": ["o"]},
    )
    assert not model.peft_config["default"].init_weights
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    one, other, both = (dense(model, name) for name in ("default", "other", "both"))
    for key, delta in both.items():
        assert torch.equal(delta, {**one, **other}.get(key, torch.zeros_like(delta))), key


def test_a_name_that_is_taken_changes_nothing():
    model = model_with({"heads": ONE}, {"heads": OTHER})
    before = logits(model)
    model.add_weighted_adapter(["other"], [3.0], "default")
    assert torch.equal(logits(model), before)
