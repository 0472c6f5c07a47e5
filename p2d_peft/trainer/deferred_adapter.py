"""A trainer whose adapter is attached when training starts, because its heads are not known before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, Trainer

from ..heads import HeadSet, ModelGeometry
from ..tuners import HeadSparseConfig
from .config import P2DConfig


class DeferredAdapter(Trainer):
    """
    What stands between `SFTTrainer` and `Trainer` in a trainer that attaches its adapter later: `Trainer` refuses a
    quantized model that has none.
    """

    _head_sparse_config: HeadSparseConfig | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _as_if_adapted(kwargs["model"], self._head_sparse_config is not None):
            super().__init__(*args, **kwargs)


@contextmanager
def _as_if_adapted(model: Any, wanted: bool) -> Iterator[None]:
    """Context in which a quantized model says that it has an adapter, as it will have."""
    if not wanted or not getattr(model, "is_quantized", False) or isinstance(model, PeftModel):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded  # the class says False


def attach(model: Any, config: HeadSparseConfig, heads: HeadSet, args: P2DConfig) -> PeftModel:
    """
    Attach HeadSparse to the selected heads of a model, as `SFTTrainer` attaches the adapter of a `peft_config`.

    Args:
        model (`PreTrainedModel`): The model; it is changed in place.
        config ([`HeadSparseConfig`]): The user's configuration; it is copied.
        heads ([`HeadSet`]): The heads to train.
        args ([`P2DConfig`]): The training's arguments.
    """
    config = copy.deepcopy(config)
    config.set_heads(heads)
    kwargs = {}
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # as in SFTTrainer: ZeRO-3 gathers all parameters into buffers of one dtype
        kwargs["autocast_adapter_dtype"] = False
    adapted: PeftModel = get_peft_model(model, config, **kwargs)
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        # Reentrant checkpoints pass no gradient on unless their input needs one. The others do, and then the backward
        # pass can end at the lowest chosen head, which is why SFTTrainer's way of asking for it always is not taken.
        adapted.enable_input_require_grads()
    return adapted


def check_attention(model: str, args: P2DConfig) -> bool:
    """
    Check that the heads of a model that is yet to be loaded can be found, which `Trainer` would learn only after the
    whole dataset is tokenized.

    Args:
        model (`str`): Folder or Hub id.
        args ([`P2DConfig`]): With how the model is loaded.

    Returns:
        `bool`: whether its weights are quantized, as far as that is known by now.

    Raises:
        `ValueError`: as [`ModelGeometry.of`] does.
    """
    kwargs = args.model_init_kwargs or {}
    trust = kwargs.get("trust_remote_code", args.trust_remote_code)
    config = AutoConfig.from_pretrained(model, revision=kwargs.get("revision"), trust_remote_code=trust)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust:  # what others are shows when they are loaded
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        ModelGeometry.of(skeleton)
    return kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config")


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: Any) -> None:
    """
    Check that an optimizer made by hand holds what will be trained.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): The user's optimizer.
        model (`nn.Module`): The model, ready for training.

    Raises:
        `ValueError`: if it lacks a weight that requires a gradient; the message names the first one.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"`optimizers` holds an optimizer that lacks {len(missing)} of the {len(trained)} weights that are trained, "
            f"first '{missing[0]}'. Make it for them, or pass `optimizer_cls_and_kwargs` instead."
        )
