import torch
from torch import nn
from transformers import trainer_pt_utils

from p2d_peft.trainer.reporting import get_model_param_count


def test_a_parameter_that_zero_3_left_empty_counts_as_what_it_is(monkeypatch):
    model = nn.ParameterList([nn.Parameter(torch.ones(3, 4))])
    assert get_model_param_count(model) == 12
    monkeypatch.setattr(trainer_pt_utils, "is_deepspeed_zero3_enabled", lambda: True)
    model[0].ds_numel, model[0].data = 12, torch.empty(0)
    assert get_model_param_count(model) == 12
