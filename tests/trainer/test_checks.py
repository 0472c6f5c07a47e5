import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import integrations
from trl import SFTConfig

from p2d_peft import HeadSet, P2DTrainer
from p2d_peft.trainer.checks import check_attention, check_optimizer, check_sharding, geometry_of_saved
from p2d_peft.trainer.choosing import choose

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_p2d_trainer import config, trainer


def spread(args, stage=3):
    """As DeepSpeed would have it, without DeepSpeed."""
    args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    return args


def test_only_zero_3_shards_too_early(tmp_path):
    check_sharding(spread(config(tmp_path), stage=2))
    with pytest.raises(ValueError, match="ZeRO-3 shards weights as they are loaded"):
        check_sharding(spread(config(tmp_path)))


@pytest.mark.parametrize(
    "given", [{}, {"heads": HeadSet([(0, 1)])}, {"peft_config": LoraConfig()}], ids=["all", "rows", "rows for LoRA"]
)
def test_zero_3_is_refused_before_a_model_is_loaded(given, tmp_path):
    args = spread(config(tmp_path))
    with pytest.raises(ValueError, match="Find them first with `p2d heads` and `p2d select`"):
        P2DTrainer(str(tmp_path / "nowhere"), args, train_dataset=prompt_completion(), **given)


def test_under_zero_3_the_reference_is_not_estimated(tmp_path, monkeypatch, caplog):
    run = trainer(tmp_path, heads=HeadSet([(0, 1)]), changes={"data_ratio": 1.0, "max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(run.args, "deepspeed_plugin", SimpleNamespace(zero_stage=3))
        state = choose(run)
    assert state.reference is None
    assert "could not be estimated, so there will be no AER: ZeRO-3 spreads the weights." in caplog.text


SMALL = "is one for full fine-tuning"


@pytest.mark.parametrize(
    ("given", "rate", "says"),
    [
        ({}, 2e-5, f"`learning_rate`=2e-05 {SMALL}, the default of SFTConfig: the deltas"),
        ({}, 5e-5, f"`learning_rate`=5e-05 {SMALL}: the deltas"),
        ({}, 1e-4, ""),
        ({}, 0.0, ""),  # to see what a run costs, or what is chosen
        ({"peft_config": LoraConfig()}, 2e-5, ""),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, 2e-5, ""),  # which has a rate of its own
    ],
    ids=["default", "small", "least", "none", "LoRA", "optimizer"],
)
def test_a_learning_rate_for_full_fine_tuning_is_told_of(given, rate, says, tmp_path, caplog):
    trainer(tmp_path, changes={"learning_rate": rate}, **given)
    assert (says in caplog.text) if says else (SMALL not in caplog.text)


def test_an_sft_configs_learning_rate_is_kept_and_told_of(tmp_path, caplog):
    args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    run = P2DTrainer(tiny_model(), args, train_dataset=prompt_completion(8), processing_class=tiny_tokenizer())
    assert run.args.learning_rate == SFTConfig.learning_rate and SMALL in caplog.text


def test_a_saved_model_is_checked_without_its_weights(tmp_path):
    folder = tmp_path / "model"
    tiny_model().config.save_pretrained(folder)
    assert check_attention(str(folder), config(tmp_path)) is False
    quantized = {"model_init_kwargs": {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)}}
    assert check_attention(str(folder), config(tmp_path, **quantized)) is True
    transformers.PersimmonConfig(num_hidden_layers=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="PersimmonForCausalLM"):
        check_attention(str(folder), config(tmp_path))


def test_under_zero_3_no_skeleton_is_made_of_a_saved_model(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    # deepspeed, which transformers would import to spread the skeleton's weights, need not be installed for this
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(
        integrations.deepspeed, "_hf_deepspeed_config_weak_ref", lambda: SimpleNamespace(is_zero3=lambda: True)
    )
    assert geometry_of_saved(str(tmp_path)) is None
    assert not check_attention(str(tmp_path), config(tmp_path), HeadSet([(0, 1)]))


def test_an_adapter_loaded_for_inference_is_refused_at_once(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model` is a PeftModel without a weight to train: .* is_trainable=True"):
        trainer(tmp_path / "out", model=PeftModel.from_pretrained(tiny_model(), tmp_path))
    trainer(tmp_path / "out", model=PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True))


def test_an_optimizer_must_hold_what_is_trained():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_optimizer(None, model)
    check_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights that are trained, first .*lora_A"):
        check_optimizer(torch.optim.SGD(trained[1:], lr=1.0), model)
