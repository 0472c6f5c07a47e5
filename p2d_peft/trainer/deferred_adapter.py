"""A trainer whose adapter is attached when training starts, because its heads are not known before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

from ..heads import HeadSet
from ..tuners import HeadSparseConfig
from .arguments import spreads_weights_as_loaded
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
    if spreads_weights_as_loaded(args):
        # as in SFTTrainer: ZeRO-3 gathers all parameters into buffers of one dtype
        kwargs["autocast_adapter_dtype"] = False
    adapted: PeftModel = get_peft_model(model, config, **kwargs)
    return adapted


class BackwardEndsAtLowestHead(TrainerCallback):
    """
    Takes back what transformers does to the embeddings where it switches on activation checkpointing: it makes their output
    need a gradient, for which each layer would be run a second time, those below the lowest chosen head as well. Only
    reentrant checkpoints cannot do without.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.get_base_model().disable_input_require_grads()
