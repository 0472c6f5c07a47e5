"""From whatever training arguments a script has to those of `P2DTrainer`."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import TrainingArguments
from trl.trainer.utils import get_config_model_id

from .config import P2DConfig


def as_p2d_config(args: TrainingArguments | None, model: Any) -> P2DConfig:
    """
    Any training arguments as a [`P2DConfig`], as `SFTTrainer` makes an `SFTConfig` of them. Those given are not changed.

    Args:
        args (`TrainingArguments`, *optional*): What the user passed.
        model (`str` or `PreTrainedModel`): The model, which names the output folder where there are no arguments.
    """
    if isinstance(args, P2DConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return P2DConfig(f"{name.split('/')[-1]}-P2D")
    known = {field.name for field in dataclasses.fields(P2DConfig)}  # a subclass's own fields are no business of ours
    # to_dict hides every token, those of the tokenizer, too
    hidden = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name.endswith("_token")}
    return P2DConfig(**{name: value for name, value in {**args.to_dict(), **hidden}.items() if name in known})


def changed(args: P2DConfig, **values: Any) -> P2DConfig:
    """A copy of arguments with other values. Not `dataclasses.replace`, which would work everything out anew."""
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def spreads_weights_as_loaded(args: TrainingArguments) -> bool:
    """Whether the model's weights are spread over the processes from the start, which ZeRO-3 alone does."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
