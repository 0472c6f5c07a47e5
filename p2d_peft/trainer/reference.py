"""The reference that the AER is relative to, in terms of a trainer."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, IterableDataset
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..efficiency import Reference, estimate_reference
from ..model_state import model_device, model_id, preserved_state
from ..selection.pool import dataset_of
from ..step_times import MakeOptimizer, TrainingLoss
from .arguments import spreads_weights_as_loaded
from .config import P2DConfig
from .measured_run import MeasuredRun


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)


# An estimate that is less sure than this is told of.
WIDE = 0.1


def check_reference(trainer: P2DTrainer, pool_rows: int | None) -> MeasuredRun | None:
    """
    Read and check the report that the user gave, before the expensive part.

    Args:
        trainer (`P2DTrainer`): The trainer.
        pool_rows (`int`, *optional*): Rows of the pool, as far as they are known.

    Returns:
        [`MeasuredRun`] or `None`: what it says, if the user gave one.

    Raises:
        `ValueError`: if the report is of another pool, or cannot be a reference at all (see [`MeasuredRun.read`]).
    """
    args: P2DConfig = trainer.args
    if args.reference_report is None:
        return None
    run = MeasuredRun.read(args.reference_report)
    is_exact = run.pool_rows is not None and not run.pool_rows_error
    if is_exact and not args.packing and pool_rows not in (None, run.pool_rows):  # packed rows are other rows
        raise ValueError(
            f"`reference_report`='{run.path}' is of a run on {run.pool_rows} rows, but `train_dataset` has {pool_rows}; "
            "the reference is full fine-tuning on the same rows."
        )
    return run


def find_reference(
    trainer: P2DTrainer,
    pool: Dataset | IterableDataset,
    pool_rows: int | None,
    pool_tokens: int | None,
    epochs: float,
) -> Reference | None:
    """
    The reference as the user gave it, in seconds or as the report of a run, or estimated from a few steps if that is
    wanted and possible. It is no stage of the method and charged to none.

    Args:
        trainer (`P2DTrainer`): A trainer before its adapter is attached; its model, flags and random numbers stay.
        pool (`Dataset` or `IterableDataset`): The whole tokenized pool.
        pool_rows (`int`, *optional*): Its rows. Where they are unknown, nothing can be estimated.
        pool_tokens (`int`, *optional*): Its tokens, see [`count_tokens`].
        epochs (`float`): Epochs that will be trained, see [`epochs_of_run`]; seconds that were given are for as many.

    Raises:
        `ValueError`: as [`check_reference`] does.
    """
    args: P2DConfig = trainer.args
    if args.reference_seconds is not None:
        return Reference(args.reference_seconds / epochs, "given")
    if (run := check_reference(trainer, pool_rows)) is not None:
        return _measured(trainer, run, pool_rows)
    if args.reference_steps == 0 or pool_rows is None or pool_tokens is None:
        return None
    return _estimated(trainer, pool, pool_rows, pool_tokens)


def _measured(trainer: P2DTrainer, run: MeasuredRun, pool_rows: int | None) -> Reference:
    args = trainer.args
    here = {"model": model_id(trainer.model), "device": args.device.type, "processes": args.world_size}
    for name, value in here.items():
        theirs = getattr(run, name)
        if None not in (theirs, value) and theirs != value:
            logger.warning(
                "The AER may mislead: `reference_report`='%s' is of a run with %s %r, this one has %r.",
                run.path,
                name,
                theirs,
                value,
            )
    if run.pool_rows is not None and pool_rows is not None and not args.packing:
        # the last batch of an epoch may be filled up
        slack = 0.05 * pool_rows + effective_batch_size(args) + run.pool_rows_error
        if abs(run.pool_rows - pool_rows) > slack:
            logger.warning(
                "The AER may mislead: by its speed, the run of `reference_report`='%s' took about %.0f rows an epoch, "
                "but `train_dataset` has %d.",
                run.path,
                run.pool_rows,
                pool_rows,
            )
    return Reference(run.seconds_per_epoch, "measured")


def _warn_of_no_estimate(reason: str | Exception) -> None:
    logger.warning(
        "The reference could not be estimated, so there will be no AER: %s Pass `reference_seconds` or "
        "`reference_report` if you have measured it, or `reference_steps=0` to go without.",
        reason,
    )


def _estimated(
    trainer: P2DTrainer, pool: Dataset | IterableDataset, pool_rows: int, pool_tokens: int
) -> Reference | None:
    args, model = trainer.args, trainer.model
    if spreads_weights_as_loaded(args):
        _warn_of_no_estimate("ZeRO-3 spreads the weights.")
        return None
    if any(parameter.is_meta for parameter in model.parameters()):
        _warn_of_no_estimate("Some of the weights are offloaded, and full fine-tuning needs all of them.")
        return None
    if args.torch_compile:
        _warn_of_no_estimate("The training is compiled, and a few steps would not show what that brings.")
        return None
    if is_sharded(trainer) and model_device(model).type != trainer.accelerator.device.type:
        _warn_of_no_estimate("The model is brought to where it is trained only then.")
        return None
    size = args.per_device_train_batch_size
    drawn = random_rows(trainer, pool, (args.reference_steps + 1) * size, pool_rows, pool_tokens)
    try:
        with training_mode(trainer) as (training_loss, make_optimizer):
            reference = estimate_reference(
                model,
                training_batches(drawn, size, trainer.pad_token_id, args.pad_to_multiple_of),
                training_loss,
                make_optimizer,
                pool_tokens=pool_tokens / args.world_size,
                steps_per_epoch=steps_of_an_epoch(args, pool_rows, pool_tokens),
            )
    except (ValueError, RuntimeError) as error:
        # of memory that ran out not all devices raise an error of its own
        if not isinstance(error, ValueError | torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        _warn_of_no_estimate(error)
        return None
    if reference.relative_error is not None and reference.relative_error > WIDE:
        logger.warning(
            "The reference is an estimate with a standard error of %.0f %%, and so is the AER: the %d timed steps took "
            "times that differ much. Raise `reference_steps`, or measure it: run with `p2d=False` and pass what that "
            "leaves as `reference_report`.",
            100 * reference.relative_error,
            args.reference_steps,
        )
    return reference


def is_sharded(trainer: P2DTrainer) -> bool:
    """Whether the training is spread by FSDP or DeepSpeed, which take the model only once it begins."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextmanager
def training_mode(trainer: P2DTrainer) -> Iterator[tuple[TrainingLoss, MakeOptimizer]]:
    """
    Context in which the model is as it will be in training; flags and random numbers are put back afterwards.

    Args:
        trainer (`P2DTrainer`): The trainer.

    Yields:
        `tuple[Callable, Callable]`: from a batch to the loss, and from parameters to their optimizer.
    """
    args, model = trainer.args, trainer.model
    device = model_device(model)
    optimizer_class, optimizer_kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args)

    def training_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        on_device = {key: value.to(device) for key, value in batch.items()}
        with trainer.accelerator.autocast(), trainer.maybe_activation_offload_context:
            if has_own_loss(trainer) or trainer.label_smoother is not None or trainer.compute_loss_func is not None:
                loss: torch.Tensor = trainer.compute_loss(model, on_device)
            else:  # what SFTTrainer computes then, without its metrics, for which all processes have to come together
                loss = model(**on_device, use_cache=False, fused_lm_head=True).loss
        return loss

    def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if is_optimizer_factory(optimizer_class):
            made: torch.optim.Optimizer = optimizer_class()(model, **optimizer_kwargs)
            return made
        return optimizer_class(parameters, **optimizer_kwargs)

    with preserved_state(model), _checkpointing_as_in_training(model, args), _counts_kept(trainer):
        model.train()
        yield training_loss, make_optimizer


def has_own_loss(trainer: P2DTrainer) -> bool:
    """Whether a subclass computes the loss in a way of its own."""
    return type(trainer).compute_loss is not SFTTrainer.compute_loss


@contextmanager
def _counts_kept(trainer: P2DTrainer) -> Iterator[None]:
    """Context after which the trainer has counted what it had before: computing a loss adds to its metrics and tokens."""
    metrics, tokens = trainer._metrics, trainer._total_train_tokens
    trainer._metrics = copy.deepcopy(metrics)
    try:
        yield
    finally:
        trainer._metrics, trainer._total_train_tokens = metrics, tokens


@contextmanager
def _checkpointing_as_in_training(model: Any, args: P2DConfig) -> Iterator[None]:
    """Switch activation checkpointing on as `Trainer.train` would, and off again."""
    # Arguments and modules have the old name in all versions of transformers, the model's methods only up to 5.21.
    name = "activation" if hasattr(type(model), "activation_checkpointing_enable") else "gradient"
    if not args.gradient_checkpointing or getattr(model, f"is_{name}_checkpointing"):
        yield
        return
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    options = {key: kwargs.pop(key) for key in ("every_n_layers", "offload") if key in kwargs}
    getattr(model, f"{name}_checkpointing_enable")(kwargs or None, **options)
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()  # enabled along with it, and left on


def effective_batch_size(args: P2DConfig) -> int:
    """Rows of an optimizer step, in all processes together."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def steps_of_an_epoch(args: P2DConfig, n_rows: int, n_tokens: float) -> int:
    """Optimizer steps of an epoch over so many rows with so many tokens."""
    if args.packing:
        assert args.max_length is not None  # checked when the trainer is made
        n_rows = math.ceil(n_tokens / args.max_length)
    n_batches = n_rows / (args.per_device_train_batch_size * args.world_size)
    n_batches = math.floor(n_batches) if args.dataloader_drop_last else math.ceil(n_batches)
    return max(1, math.ceil(n_batches / args.gradient_accumulation_steps))


def epochs_of_run(args: P2DConfig, n_rows: int | None, n_tokens: float | None) -> float:
    """
    Epochs that will be trained on so many rows with so many tokens. `num_train_epochs` does not count beside `max_steps`.
    A stream of which nobody knows how long it is has one, as `Trainer` counts.
    """
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    if n_rows is None or n_tokens is None:
        return 1.0
    return args.max_steps / steps_of_an_epoch(args, n_rows, n_tokens)


def random_rows(
    trainer: P2DTrainer, pool: Dataset | IterableDataset, count: int, pool_rows: int, pool_tokens: int
) -> Dataset:
    """
    So many rows, or less if there are not so many, as the training would take them: drawn from a pool (of a stream, its
    first ones), packed, or in batches of like length.
    """
    args = trainer.args
    needed = math.ceil(count * args.max_length / pool_tokens * pool_rows) if args.packing else count
    needed = min(needed, pool_rows)
    if isinstance(pool, IterableDataset):
        drawn = dataset_of(list(pool.take(needed)), pool)
    elif args.train_sampling_strategy == "group_by_length" and not args.packing:
        drawn = pool.select(_in_batches_of_like_length(args, pool)[:needed])
    else:
        drawn = pool.shuffle(seed=args.seed).select(range(needed))
    if args.packing:
        drawn = trainer._prepare_dataset(drawn, trainer.processing_class, args, True, None, "drawn")
    return drawn.select(range(min(len(drawn), count)))


def _in_batches_of_like_length(args: P2DConfig, pool: Dataset) -> list[int]:
    """The rows' numbers, batch by batch as `Trainer` groups them, the batches in a random order."""
    generator = torch.Generator().manual_seed(args.seed)
    lengths = [len(ids) for ids in pool.with_format(None)["input_ids"]]
    sampler = LengthGroupedSampler(
        args.train_batch_size * args.gradient_accumulation_steps, lengths=lengths, generator=generator
    )
    order, size = list(sampler), args.per_device_train_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    return [row for number in torch.randperm(len(whole), generator=generator).tolist() for row in whole[number]]


def training_batches(
    dataset: Dataset, size: int, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """
    The batches of a prepared dataset as the training would make them, but never padding-free, which only
    FlashAttention can tell apart into rows.

    Returns:
        `list[dict[str, torch.Tensor]]`: `input_ids`, `attention_mask` and `labels` of shape (size, T), int64.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    columns = [column for column in ("input_ids", "labels") if column in dataset.column_names]
    rows = dataset.select_columns(columns).with_format(None).to_list()
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def count_tokens(dataset: Dataset, args: P2DConfig) -> int:
    """
    Tokens of a prepared dataset that are trained on. Rows that are to be packed are not cut off beforehand; `bfd` drops
    what of a row is beyond `max_length`, the other strategies put it into the next pack.
    """
    longest = args.max_length if args.packing and args.packing_strategy == "bfd" else None
    lengths = map(len, dataset.with_format(None)["input_ids"])
    return sum(lengths if longest is None else (min(length, longest) for length in lengths))
