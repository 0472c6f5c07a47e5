import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import trainer_pt_utils

from p2d_peft import HeadSet
from p2d_peft.report.reproduce import reproduction
from p2d_peft.trainer.reporting import changed_arguments, get_model_param_count

from .test_p2d_trainer import config, trainer


def test_a_parameter_that_zero_3_left_empty_counts_as_what_it_is(monkeypatch):
    model = nn.ParameterList([nn.Parameter(torch.ones(3, 4))])
    assert get_model_param_count(model) == 12
    monkeypatch.setattr(trainer_pt_utils, "is_deepspeed_zero3_enabled", lambda: True)
    model[0].ds_numel, model[0].data = 12, torch.empty(0)
    assert get_model_param_count(model) == 12


def test_tokens_with_a_slash_are_no_paths(tmp_path):
    args = config(tmp_path, eos_token="</s>", chat_template_path="a/b", hub_token="hf_secret/")
    arguments = changed_arguments(args)
    assert arguments["eos_token"] == "</s>" and not {"chat_template_path", "hub_token"} & set(arguments)


@pytest.mark.parametrize("p2d", [True, False])
def test_the_kind_of_another_adapter_is_told(p2d, tmp_path):
    changes = {"max_steps": 1, "reference_steps": 0, "scorer": "random", "p2d": p2d}
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    run = trainer(tmp_path, changes=changes, peft_config=lora)
    run.train()
    assert run.report.arguments["peft_type"] == "LORA"
    assert "add its --lora_ options" in reproduction(run.report)[1]
    none = trainer(tmp_path, changes=changes, heads=HeadSet([(0, 1)]) if p2d else None)
    none.train()
    assert "peft_type" not in none.report.arguments
