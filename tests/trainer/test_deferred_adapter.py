import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.trainer.deferred_adapter import attach, check_attention, check_optimizer

from ..tiny_models import tiny_model
from .test_p2d_trainer import config


def test_attaching_leaves_the_users_config_as_it_is(tmp_path):
    mine = HeadSparseConfig(target_modules=["q_proj"])
    model = attach(tiny_model(), mine, HeadSet([(1, 2)]), config(tmp_path))
    assert mine.heads is None and model.peft_config["default"].heads == {1: [2]}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.layers.1.self_attn.q_proj.head_sparse_delta.default"
    ]
    assert not model.get_input_embeddings()._forward_hooks  # the backward pass ends at layer 1


def test_reentrant_checkpoints_get_an_input_that_needs_a_gradient(tmp_path):
    args = config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    model = attach(tiny_model(), HeadSparseConfig(), HeadSet([(1, 2)]), args)
    assert model.get_input_embeddings()._forward_hooks


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
