import dataclasses

import pytest
import torch
from accelerate import ParallelismConfig
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.trainer.arguments import as_p2d_config

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer


CPU = {"bf16": False, "use_cpu": True, "report_to": "none"}


def as_sft_trainer_has_it(args):
    values = {**args.to_dict(), "hub_token": args.hub_token}
    return args if isinstance(args, SFTConfig) else SFTConfig(**values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_steps": 0.1, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"accelerator_config": {"split_batches": True}, "debug": "underflow_overflow"},
        {
            "eval_strategy": "steps",
            "eval_steps": 0.1,
            "save_strategy": "steps",
            "save_steps": 0.2,
            "push_to_hub": True,
        },
        {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_values_are_those_that_sft_trainer_goes_by(kind, changes, tmp_path):
    args = kind(str(tmp_path), **CPU, hub_token="secret", **changes)
    before = {name: str(value) for name, value in vars(args).items()}
    theirs = as_sft_trainer_has_it(args)
    ours = as_p2d_config(args, None)
    assert type(ours) is P2DConfig and ours.hub_token == "secret"
    for name in SFTConfig.__dataclass_fields__:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a == b or str(a) == str(b), name
    assert {name: str(value) for name, value in vars(args).items()} == before


def test_objects_stay_objects_and_what_was_given_is_not_written_into(tmp_path):
    given = {"dtype": torch.float64}
    args = SFTConfig(
        str(tmp_path), **CPU, model_init_kwargs=given, eos_token="</s>", parallelism_config=ParallelismConfig()
    )
    ours = as_p2d_config(args, None)
    assert given == {"dtype": torch.float64} and ours.model_init_kwargs == given
    assert ours.parallelism_config is args.parallelism_config is not None and ours.eos_token == "</s>"
    ours.model_init_kwargs["dtype"] = "auto"
    ours.accelerator_config.dispatch_batches = False  # as SFTTrainer does where the data is a stream
    assert given == {"dtype": torch.float64} and args.accelerator_config.dispatch_batches is None
    plain = TrainingArguments(str(tmp_path), **CPU, parallelism_config=ParallelismConfig())
    assert as_p2d_config(plain, None).parallelism_config is plain.parallelism_config


def test_a_model_is_loaded_in_the_type_that_was_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    args = SFTConfig(str(tmp_path / "out"), **CPU, model_init_kwargs={"dtype": torch.float64})
    run = P2DTrainer(str(tmp_path / "model"), args, train_dataset=prompt_completion(8))
    assert run.model.dtype == torch.float64


@dataclasses.dataclass
class MyConfig(SFTConfig):
    my_flag: int = 7


class Reads(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.found += [args.my_flag, args.set_later]


def test_what_a_subclass_adds_comes_along(tmp_path):
    args = MyConfig(str(tmp_path), **CPU, max_steps=1, my_flag=8, save_strategy="no", disable_tqdm=True)
    args.set_later = 9
    callback = Reads()
    run = P2DTrainer(
        tiny_model(),
        args,
        train_dataset=prompt_completion(32),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    run.args.reference_steps, run.args.scorer, run.args.localize_method = 0, "random", "random"
    run.train()
    assert callback.found == [8, 9] and "my_flag" not in run.report.arguments
