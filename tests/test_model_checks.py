import math

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from p2d_peft import localize_heads
from p2d_peft.model_checks import check_module, check_runnable, check_vocabulary

from .tiny_models import LAYOUTS, random_batch, tiny_model


def test_a_name_is_no_model():
    check_module(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"`model` must be a model .*, got str\. Load it with"):
        check_module("gpt2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_in_each_dtype(dtype, value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    check_runnable(model)
    model[1].bias.data[1] = value
    with pytest.raises(ValueError, match=r"holds NaN or an infinity in '1\.bias'"):
        check_runnable(model)


def test_large_weights_of_half_precision_are_numbers():
    model = nn.Linear(64, 64).to(torch.float16)
    model.weight.data.fill_(6e4)  # their sum is none
    check_runnable(model)


def test_integers_and_empty_weights_are_passed_over():
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.sharded = nn.Parameter(torch.empty(0))
    check_runnable(model)


def test_weights_that_accelerate_brings_are_there():
    batch = random_batch()
    expected = localize_heads(tiny_model(), [batch], method="gate")
    model = tiny_model()
    cpu_offload(model, torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    check_runnable(model)
    torch.testing.assert_close(localize_heads(model, [batch], method="gate").values, expected.values)


@pytest.mark.parametrize("model", [tiny_model, LAYOUTS["t5"].model])
def test_tokens_need_embeddings(model):
    check_vocabulary("pool", 0, 95, model())
    for lowest, highest, named in ((0, 96, 96), (-2, 3, -2)):
        with pytest.raises(ValueError, match=rf"`pool` holds the token id {named}, but `model` has .* ids 0 to 95"):
            check_vocabulary("pool", lowest, highest, model())


def test_a_model_that_does_not_tell_its_vocabulary_is_believed():
    check_vocabulary("pool", 0, 10**9, nn.Linear(1, 1))
