from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from p2d_peft.trainer.checks import check_attention, check_optimizer, check_sharding

from ..tiny_models import tiny_model
from .test_p2d_trainer import config


@pytest.mark.parametrize("stage", [2, 3])
def test_only_zero_3_shards_too_early(stage):
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    if stage == 2:
        check_sharding(args)
    else:
        with pytest.raises(ValueError, match="ZeRO-3 shards weights as they are loaded"):
            check_sharding(args)


def test_a_saved_model_is_checked_without_its_weights(tmp_path):
    folder = tmp_path / "model"
    tiny_model().config.save_pretrained(folder)
    assert check_attention(str(folder), config(tmp_path)) is False
    quantized = {"model_init_kwargs": {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}}
    assert check_attention(str(folder), config(tmp_path, **quantized)) is True
    transformers.PersimmonConfig(num_hidden_layers=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="PersimmonForCausalLM"):
        check_attention(str(folder), config(tmp_path))


def test_an_optimizer_must_hold_what_is_trained():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_optimizer(None, model)
    check_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights that are trained, first .*lora_A"):
        check_optimizer(torch.optim.SGD(trained[1:], lr=1.0), model)
