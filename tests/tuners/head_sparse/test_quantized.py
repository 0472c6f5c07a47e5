"""On weights that bitsandbytes quantized, through PEFT's generic quantization backends."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend, ForwardOnlyQuantizationBackend
from torch import nn

from p2d_peft.tuners import HeadSparseConfig, HeadSparseLayer
from p2d_peft.tuners.head_sparse import Linear, WeightSlice
from tests.quantized_models import SCHEMES, load_quantized, save_base
from tests.tiny_models import random_batch
from tests.tuners.head_sparse.test_layer import bits
from tests.tuners.head_sparse.test_model import layers_of, logits, randomize


bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:.*MatMul8bitLt")

HEADS = {0: [1], 2: [0, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_train_save_and_load(scheme, r, folder, tmp_path):
    config = HeadSparseConfig(heads=HEADS, r=r)
    assert torch.equal(
        bits(logits(get_peft_model(load_quantized(folder, scheme), config))),
        bits(logits(load_quantized(folder, scheme))),
    )
    model = get_peft_model(load_quantized(folder, scheme), config).train()
    backend = Bnb8bitBackend if scheme == "int8" else Bnb4bitBackend
    for layer in layers_of(model):
        assert isinstance(layer.quantization_backend, backend)
        assert f"quantization_backend='{backend.backend_name}'" in repr(layer)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        loss = model(**random_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_quantized(folder, scheme), tmp_path)
    assert torch.equal(bits(logits(loaded)), bits(logits(model.eval())))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merge_is_as_exact_as_the_quantization(scheme, folder):
    model = randomize(get_peft_model(load_quantized(folder, scheme), HeadSparseConfig(heads=HEADS)), std=0.1)
    layer = model.get_submodule("base_model.model.model.layers.2.self_attn.q_proj")
    logits(model)  # from here on bitsandbytes may keep its 4-bit weights in another order
    exact = layer.get_base_weight().clone()
    wanted = exact + layer.get_delta_weight("default").detach().to(exact)
    step = wanted.abs().max() * (0.2 if "nf4" in scheme else 0.02)  # of the values that a weight can have
    model.merge_adapter(safe_merge=True)
    assert isinstance(layer.base_layer, bnb.nn.Linear8bitLt if scheme == "int8" else bnb.nn.Linear4bit)
    assert (layer.get_base_weight() - wanted).abs().max() < step
    assert (layer.get_base_weight() - exact).abs().max() > step
    merged = logits(model)
    model.unmerge_adapter()
    assert (layer.get_base_weight() - exact).abs().max() < step
    assert not any(layer.merged for layer in layers_of(model))

    unloaded = model.merge_and_unload()
    assert not any(isinstance(module, HeadSparseLayer) for module in unloaded.modules())
    assert torch.isfinite(logits(unloaded)).all() and torch.isfinite(merged).all()


def test_safe_merge_finds_nan_before_a_weight_is_quantized_again(folder):
    model = get_peft_model(load_quantized(folder, "nf4"), HeadSparseConfig(heads=HEADS))
    with torch.no_grad():
        layers_of(model)[-1].head_sparse_delta["default"].weight[0, 0] = float("nan")
    before = [layer.base_layer.weight.clone() for layer in layers_of(model)]
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(layer.base_layer.weight, old) for layer, old in zip(layers_of(model), before, strict=True))


def test_kbit_training_with_gradient_checkpointing(folder):
    base = prepare_model_for_kbit_training(load_quantized(folder, "nf4, double"))
    model = get_peft_model(base, HeadSparseConfig(heads=HEADS)).train()
    model(**random_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in model.parameters() if p.requires_grad)


def test_a_backend_that_cannot_merge_says_so_and_runs(monkeypatch):
    """Such as GPTQ's: the layer asks for nothing but the base layer's own forward pass."""
    monkeypatch.setattr(
        "p2d_peft.tuners.head_sparse.layer.resolve_quantization_backend",
        lambda base_layer, **kwargs: ForwardOnlyQuantizationBackend("gptq"),
    )
    layer = Linear(nn.Linear(6, 8), "default", WeightSlice(0, (1, 5)), HeadSparseConfig(init_weights=False))
    x = torch.randn(2, 6)
    assert not torch.equal(layer(x), layer.base_layer(x))
    for safe_merge in (False, True):
        with pytest.raises(TypeError, match="not supported for gptq layers"):
            layer.merge(safe_merge=safe_merge)
    assert not layer.merged
