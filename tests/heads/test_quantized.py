"""Localizing on weights that bitsandbytes quantized."""

from typing import get_args

import pytest
import torch

from p2d_peft.heads import localize_heads
from p2d_peft.heads.localize import LocalizeMethod
from p2d_peft.model_state import preserved_state

from ..quantized_models import SCHEMES, SIZES, load_quantized, save_base
from ..tiny_models import random_batch, tiny_model


pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
WITHOUT_WEIGHTS = ("gate", "ablation", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", ["gate", "ablation"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_methods_that_look_at_no_weights_give_about_the_scores_of_the_unquantized_model(scheme, method, folder):
    batch = random_batch(rows=4)
    model = load_quantized(folder, scheme).eval()
    with preserved_state(model), torch.no_grad():  # see there for what inference may do to 4-bit weights
        before = model(**batch).logits
    parameters = {name: (parameter, parameter._version) for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    scores = localize_heads(model, [batch], method=method).values
    exact = localize_heads(tiny_model(**SIZES), [batch], method=method).values
    assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > 0.8
    assert {name: (parameter, parameter._version) for name, parameter in model.named_parameters()} == parameters
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    with preserved_state(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("method", [method for method in get_args(LocalizeMethod) if method not in WITHOUT_WEIGHTS])
def test_the_others_say_what_they_need(method, folder):
    with pytest.raises(ValueError, match=rf"`method`='{method}' needs floating-point weights, but .*'gate' or 'ablat"):
        localize_heads(load_quantized(folder, "nf4"), [random_batch()], method=method)
