"""A trainer whose adapter is attached when training starts, because its heads are not known before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from ..heads import HeadSet, ModelGeometry
from ..tuners import HeadSparseConfig, HeadSparseModel
from .arguments import spreads_weights_as_loaded
from .config import P2DConfig
from .state import P2DState


class DeferredAdapter(Trainer):
    """
    What stands between `SFTTrainer` and `Trainer` in a trainer that attaches its adapter later: `Trainer` refuses a
    quantized model that has none, and makes an optimizer of the weights that there are when it is told to.
    """

    optimizer: Any
    lr_scheduler: Any
    _head_sparse_config: HeadSparseConfig | None
    _p2d_state: P2DState | None
    _early_optimizer: torch.optim.Optimizer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _as_if_adapted(kwargs["model"], self._head_sparse_config is not None):
            super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_early = self.optimizer is None and self._head_sparse_config is not None and self._p2d_state is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if is_early:
            self._early_optimizer = optimizer
        return optimizer

    def drop_early_optimizer(self) -> None:
        """
        Let go of an optimizer that was made before the weights that it is to train; `Trainer` makes another one in time.

        Raises:
            `ValueError`: if the user has set it, so that no other is like it.
        """
        if self.optimizer is None:
            return
        if self.optimizer is not self._early_optimizer:
            raise ValueError(
                f"`trainer.optimizer` was set to a {type(self.optimizer).__name__}, but the weights to train do not exist "
                "before `train()`. Pass `optimizer_cls_and_kwargs` to the trainer instead."
            )
        if getattr(self.lr_scheduler, "optimizer", None) is self.optimizer:
            self.lr_scheduler = None
        self.optimizer = self._early_optimizer = None


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


def check_attachable(model: nn.Module, config: HeadSparseConfig) -> None:
    """
    Check what can be checked of a config before its heads are known: with all of the model's heads it has to fit.

    Raises:
        `ValueError`: if it does not, for example because `target_modules` leave nothing to train.
    """
    config = copy.deepcopy(config)
    if config.heads is None:
        config.set_heads(ModelGeometry.of(model).heads)
    HeadSparseModel.check(model, config)


def attach(model: Any, config: HeadSparseConfig, heads: HeadSet, args: P2DConfig) -> PeftModel:
    """
    Attach HeadSparse to the selected heads of a model, as `SFTTrainer` attaches the adapter of a `peft_config`. Where that
    fails, the model is what it was.

    Args:
        model (`PreTrainedModel`): The model; it is changed in place.
        config ([`HeadSparseConfig`]): The user's configuration; it is copied.
        heads ([`HeadSet`]): The heads to train.
        args ([`P2DConfig`]): The training's arguments.
    """
    config = copy.deepcopy(config)
    config.set_heads(heads)
    kwargs = {}
    if spreads_weights_as_loaded(args):
        # as in SFTTrainer: ZeRO-3 gathers all parameters into buffers of one dtype
        kwargs["autocast_adapter_dtype"] = False
    put_back = modules_to_put_back(model)
    # of a user's own making: PEFT's hook would hide it, and nobody could take it off any more
    embeddings_need_gradients = bool(getattr(model, "_require_grads_hooks", None))
    if embeddings_need_gradients:
        model.disable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        adapted: PeftModel = get_peft_model(model, config, **kwargs)
    except BaseException:
        put_back()
        for parameter in trained:
            parameter.requires_grad_(True)
        if embeddings_need_gradients:
            model.enable_input_require_grads()
        raise
    return adapted


def modules_to_put_back(model: nn.Module) -> Callable[[], None]:
    """What puts the very modules back into a model that it has now, when PEFT has put others in their place."""
    children = [(module, dict(module.named_children())) for module in model.modules()]
    configs = vars(model).get("peft_config")  # of adapters that were taken off

    def put_back() -> None:
        for module, named in children:
            for name, child in named.items():
                if module.get_submodule(name) is not child:
                    setattr(module, name, child)
        vars(model).pop("peft_config", None)
        if configs is not None:
            model.peft_config = configs

    return put_back


class BackwardEndsAtLowestHead(TrainerCallback):
    """
    Takes back what transformers does to the embeddings where it switches on activation checkpointing: it makes their output
    need a gradient, for which each layer would be run a second time, those below the lowest chosen head as well. Only
    reentrant checkpoints cannot do without.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.get_base_model().disable_input_require_grads()
