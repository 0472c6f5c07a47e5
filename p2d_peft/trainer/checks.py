"""What can be wrong with a run, found before anything expensive is done."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from datasets import Dataset, IterableDataset
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import OptimizerNames
from trl import SFTConfig, pack_dataset

from ..heads import HeadSet, ModelGeometry
from .arguments import spreads_weights_as_loaded
from .config import P2DConfig


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

# below it a few dozen steps hardly move deltas that begin at zero (docs/results.md has what rates do)
LEAST_LEARNING_RATE = 1e-4


def check_sharding(args: P2DConfig) -> None:
    """
    Check that the first two stages can run the model, which is whole on each rank until training starts, but for ZeRO-3.

    Raises:
        `ValueError`: if its weights are sharded as soon as it is loaded.
    """
    if spreads_weights_as_loaded(args):
        raise ValueError(
            "ZeRO-3 shards weights as they are loaded, so heads and rows cannot be looked for in the same run. Find them "
            "first with `p2d heads` and `p2d select`; then pass the rows, `heads=` and `P2DConfig(data_ratio=1.0)`. Or "
            "use ZeRO-2 or FSDP."
        )


def geometry_of_saved(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> ModelGeometry | None:
    """
    The heads of a saved model, without its weights; None where its class is not known before it is loaded.

    Args:
        model (`str`): Folder or Hub id.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*): As in `from_pretrained`.

    Raises:
        `ValueError`: as [`ModelGeometry.of`] does.
    """
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    return _geometry_of_configured(config, trust_remote_code)


def _geometry_of_configured(config: PretrainedConfig, trust_remote_code: bool) -> ModelGeometry | None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        return None
    if is_deepspeed_zero3_enabled():  # by which transformers spreads weights as it makes them, and here are none
        return None
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return ModelGeometry.of(skeleton)


def check_attention(model: str, args: P2DConfig, heads: HeadSet | None = None) -> bool:
    """
    Check that the heads of a model that is yet to be loaded can be found, which `Trainer` would learn only after the
    whole dataset is tokenized.

    Args:
        model (`str`): Folder or Hub id.
        args ([`P2DConfig`]): With how the model is loaded.
        heads ([`HeadSet`], *optional*): Heads that the model should have.

    Returns:
        `bool`: whether its weights are quantized, as far as that is known by now.

    Raises:
        `ValueError`: as [`ModelGeometry.of`] does, or if the model lacks one of `heads`.
    """
    kwargs = args.model_init_kwargs or {}
    trust = bool(kwargs.get("trust_remote_code", args.trust_remote_code))
    config = AutoConfig.from_pretrained(model, revision=kwargs.get("revision"), trust_remote_code=trust)
    geometry = _geometry_of_configured(config, trust)
    if geometry is not None and heads is not None:
        geometry.check(heads)
    return kwargs.get("quantization_config") is not None or hasattr(config, "quantization_config")


def check_packing(args: P2DConfig) -> None:
    """
    Check the arguments of packing, which is put off until rows are chosen, so that `SFTTrainer` would refuse them only then.

    Raises:
        `ValueError`: as `SFTTrainer` does.
    """
    if args.max_length is None:
        raise ValueError("When packing is enabled, `max_length` can't be `None`.")
    pack_dataset(Dataset.from_dict({"input_ids": [[0]]}), args.max_length, args.packing_strategy)


def check_rows_are_left(name: str, dataset: Any, prepared: Any, args: P2DConfig) -> None:
    """
    Check that a dataset still has rows once it is prepared: `SFTTrainer` leaves out those of which truncation leaves no token
    that counts. Of fewer rows than there were, it tells.

    Args:
        name (`str`): The argument that it was given as.
        dataset (`Dataset` or `IterableDataset`): The dataset as it was given; of a stream nothing is known.
        prepared (`Dataset` or `IterableDataset`): What became of it.
        args ([`P2DConfig`]): With the `max_length`.

    Raises:
        `ValueError`: if there is none.
    """
    if not (isinstance(dataset, Dataset) and isinstance(prepared, Dataset)) or len(prepared) == len(dataset):
        return
    if not len(prepared):
        raise ValueError(
            f"None of the {len(dataset)} rows of `{name}` has a token that counts within `max_length`={args.max_length}. "
            "Raise it, or look at what is masked."
        )
    logger.warning(
        "%d of the %d rows of `%s` have no token that counts within `max_length`=%s and are left out; the others are "
        "numbered without them.",
        len(dataset) - len(prepared),
        len(dataset),
        name,
        args.max_length,
    )


def warn_of_small_learning_rate(args: P2DConfig) -> None:
    """Say so where the learning rate is one for full fine-tuning, as `SFTConfig`'s default is, and HeadSparse is trained."""
    if 0 < args.learning_rate < LEAST_LEARNING_RATE:
        logger.warning(
            "`learning_rate`=%g is one for full fine-tuning%s: the deltas on the chosen heads begin at zero and hardly move at "
            "it. Begin with 1e-3.",
            args.learning_rate,
            ", the default of SFTConfig" if args.learning_rate == SFTConfig.learning_rate else "",
        )


def check_batches_are_left(args: P2DConfig, selected: Any) -> None:
    """
    Check that `dataloader_drop_last` leaves a batch of the rows that are to be trained on.

    Args:
        args ([`P2DConfig`]): The arguments.
        selected (`Dataset`, `IterableDataset` or `int`): The rows, or their number; of a stream nothing is known.

    Raises:
        `ValueError`: if it leaves none.
    """
    if isinstance(selected, IterableDataset) or not args.dataloader_drop_last:
        return
    n_rows = selected if isinstance(selected, int) else len(selected)
    size = args.per_device_train_batch_size * args.world_size
    if n_rows < size:
        raise ValueError(
            f"`dataloader_drop_last` leaves no batch: {n_rows} rows are to be trained on, and a batch of all processes has "
            f"{size}. Raise `data_ratio` ({args.data_ratio}), or lower `per_device_train_batch_size` "
            f"({args.per_device_train_batch_size})."
        )


def check_optimizer_is_there(trainer: P2DTrainer) -> None:
    """
    Check that the optimizer that `optim` names is installed, which `Trainer` would learn only when the first two stages are
    over.

    Raises:
        `ImportError` or `ValueError`: as `Trainer` does, with the name of the package.
    """
    args = trainer.args
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        return
    try:
        trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError:
        # these want to see the model, which is not what it will be
        if args.optim_target_modules is None and args.optim not in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            raise


def check_trainable(model: Any) -> None:
    """
    Check that a `PeftModel` that is to be trained as it is can be.

    Raises:
        `ValueError`: if none of its weights requires a gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"`model` is a {type(model).__name__} without a weight to train: none requires a gradient. Load its adapter "
            "with `PeftModel.from_pretrained(..., is_trainable=True)`."
        )


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
