import torch
from torch import nn

from p2d_peft.trainer.reporting import n_weights


def test_a_parameter_that_zero_3_left_empty_counts_as_what_it_is():
    parameter = nn.Parameter(torch.ones(3, 4))
    assert n_weights(parameter) == 12
    parameter.ds_numel, parameter.data = 12, torch.empty(0)
    assert n_weights(parameter) == 12
