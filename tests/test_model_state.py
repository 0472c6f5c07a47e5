from types import SimpleNamespace

import pytest
import torch

from p2d_peft.model_state import model_device, model_id, preserved_state, uncompiled, where_float64_is

from .quantized_models import load_quantized, save_base
from .tiny_models import random_batch, tiny_model


def test_modes_flags_and_random_numbers_come_back_also_after_an_exception():
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad = False
    expected_next = torch.rand(3, generator=torch.Generator().set_state(torch.get_rng_state()))
    with pytest.raises(RuntimeError, match="boom"), preserved_state(model):
        model.eval()
        model.requires_grad_(True)
        torch.rand(5)
        raise RuntimeError("boom")
    assert model.training and not model.model.layers[0].training and not model.model.layers[0].mlp.training
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert torch.equal(torch.rand(3), expected_next)


def test_four_bit_weights_are_not_reordered(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_quantized(save_base(tmp_path), "nf4").eval()
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # on whatever CPU this runs
    before = [layer.weight.data for layer in layers]
    with preserved_state(model), torch.no_grad():
        model(**random_batch())
    assert layers and all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(torch.equal(layer.weight.data, data) for layer, data in zip(layers, before, strict=True))


def test_hooks_work_on_a_compiled_model_whose_code_was_compiled_without_them():
    model, batch, seen = tiny_model(), random_batch(), []
    layer = model.model.layers[0]
    layer.compile(backend="eager")
    with torch.no_grad():
        model(**batch)
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        with uncompiled():
            model(**batch)
    handle.remove()
    assert len(seen) == 1


def test_values_go_where_float64_is():
    values = torch.ones(2)
    assert where_float64_is(values) is values
    on_a_mac = SimpleNamespace(device=torch.device("mps"), cpu=lambda: values)
    assert where_float64_is(on_a_mac) is values


def test_device_and_id():
    model = tiny_model()
    assert model_device(model) == torch.device("cpu") == model_device(torch.nn.Linear(1, 1))
    assert model_id(model) is None
    model.config.name_or_path = "org/name"
    assert model_id(model) == "org/name"
