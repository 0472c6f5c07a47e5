"""From whatever training arguments a script has to those of `P2DTrainer`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.trainer.utils import get_config_model_id

from .config import P2DConfig


def as_p2d_config(args: TrainingArguments | None, model: Any) -> P2DConfig:
    """
    Any training arguments as a [`P2DConfig`], as `SFTTrainer` makes an `SFTConfig` of them. Those given are not changed.
    What a subclass adds to them, its own fields, say, becomes attributes; methods that it overrides do not come along.

    Args:
        args (`TrainingArguments`, *optional*): What the user passed.
        model (`str` or `PreTrainedModel`): The model, which names the output folder where there are no arguments.
    """
    if isinstance(args, P2DConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return P2DConfig(f"{name.split('/')[-1]}-P2D")
    # Not to_dict, as SFTTrainer has it: that hides tokens, and makes text of objects, also within the user's own.
    known = {field.name for field in dataclasses.fields(P2DConfig) if field.init}
    config = P2DConfig(**{name: _copied(getattr(args, name)) for name in known & vars(args).keys()})
    for name, value in vars(args).items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def _copied(value: Any) -> Any:
    """A copy of what arguments and trainers write into."""
    return copy.copy(value) if isinstance(value, dict | list | AcceleratorConfig) else value


def changed(args: P2DConfig, **values: Any) -> P2DConfig:
    """A copy of arguments with other values. Not `dataclasses.replace`, which would work everything out anew."""
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def spreads_weights_as_loaded(args: TrainingArguments) -> bool:
    """Whether the model's weights are spread over the processes from the start, which ZeRO-3 alone does."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
