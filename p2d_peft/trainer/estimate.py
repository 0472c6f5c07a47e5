"""What a run will take, from a few batches: the work behind `P2DTrainer.estimate`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from datasets import Dataset
from peft import inject_adapter_in_model

from ..heads import HeadSet, localize_heads
from ..heads.samples import IGNORED
from ..memory import PeakMemory, memory_kind
from ..model_state import preserved_state
from ..processes import settle
from ..selection import P2DDataSelector
from ..step_times import StepTimes, time_steps
from ..tuners import HeadSparseConfig
from .choosing import best_heads, draw_target, make_selector, raw_where_another_tokenizer_reads, scoring_heads
from .deferred_adapter import modules_to_put_back
from .reference import (
    check_reference,
    count_tokens,
    epochs_of_run,
    find_reference,
    random_rows,
    steps_of_an_epoch,
    training_batches,
    training_mode,
)
from .run_estimate import RunEstimate
from .tokenized import tokenized


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

# Training steps to time, after one to warm up.
STEPS = 3
_ADAPTER = "p2d_estimate"

Result = TypeVar("Result")


def estimate_run(trainer: P2DTrainer) -> RunEstimate:
    """
    See [`P2DTrainer.estimate`].

    Training is timed with an adapter on random heads, or on the given ones, on random rows of the pool: which heads and
    rows will be chosen is not known. The adapter is gone afterwards. Training comes first, so that all kernels are loaded
    when the other stages are timed.

    Args:
        trainer (`P2DTrainer`): A trainer before its training.

    Raises:
        `ValueError`: if `p2d` is off, the heads and rows are chosen already, or the pool is a stream, or as
            [`check_reference`] does.
    """
    args = trainer.args
    if not args.p2d:
        raise ValueError("`estimate()` is about the stages of P2D, but `p2d` is False.")
    if trainer._p2d_state is not None:
        raise ValueError("`estimate()` is for before `train()`; what the run took is in `trainer.report`.")
    if not isinstance(trainer.train_dataset, Dataset):
        raise ValueError(
            "`estimate()` needs to know how much there is to score and to train on, but `train_dataset` is a "
            f"{type(trainer.train_dataset).__name__}. Try it on a `datasets.Dataset` of its first rows."
        )
    start = time.perf_counter()
    check_reference(trainer, len(trainer.train_dataset))  # one that will not do is told of first
    began = time.perf_counter()
    pool = tokenized(trainer, trainer.train_dataset)
    tokenizing = time.perf_counter() - began  # by a collator of the user's, in each process
    target = draw_target(trainer, pool)
    n_tokens = count_tokens(pool, args)
    heads = scored_by = trainer.heads
    if heads is None and trainer.wants_heads:
        scores = localize_heads(trainer.model, [], method="random", seed=args.seed)
        heads, scored_by = best_heads(scores, trainer), scoring_heads(scores, trainer)
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    with preserved_state(trainer.model):
        times, peaks["train"] = _watched(lambda: _training_steps(trainer, pool, n_tokens, heads))
        selected_rows, selected_tokens = len(pool), float(n_tokens)
        with trainer.accelerator.autocast():
            if trainer.heads is None and trainer.wants_heads:
                seconds["localize"], peaks["localize"] = _watched(lambda: _localize_seconds(trainer, target))
            if trainer._given_selector is not None or args.data_ratio < 1:
                selector = trainer._given_selector or make_selector(trainer, scored_by, target)
                rows = raw_where_another_tokenizer_reads(selector, trainer, pool)
                scoring, peaks["select"] = _watched(lambda: selector.estimate(rows))
                seconds["select"] = tokenizing + scoring.seconds / args.world_size
                selected_rows = _number_of_rows(selector, len(pool), n_tokens)
                selected_tokens = n_tokens * selected_rows / len(pool)
        steps_per_epoch = steps_of_an_epoch(args, selected_rows, selected_tokens)
        epochs = epochs_of_run(args, selected_rows, selected_tokens)
        seconds["train"] = epochs * times.seconds(selected_tokens / args.world_size, steps_per_epoch)
        reference = find_reference(trainer, pool, len(pool), n_tokens, epochs)
    return RunEstimate(
        stage_seconds=seconds,
        train_relative_error=times.relative_error,
        reference_seconds=None if reference is None else reference.seconds_per_epoch * epochs,
        reference_source=None if reference is None else reference.source,
        reference_relative_error=None if reference is None else reference.relative_error,
        stage_peak_memory={stage: peaks[stage] for stage in seconds},
        peak_memory_kind=memory_kind(),
        epochs=epochs,
        pool_rows=len(pool),
        selected_rows=selected_rows,
        measured_seconds=time.perf_counter() - start,
    )


def _number_of_rows(selector: P2DDataSelector, n_rows: int, n_tokens: int) -> int:
    """How many rows a selector will keep, as far as its policies let it."""
    if selector.max_tokens is None:
        return selector._count(n_rows)
    return min(max(1, round(selector.max_tokens / n_tokens * n_rows)), n_rows)


def _watched(work: Callable[[], Result]) -> tuple[Result, int]:
    """What some work gives, and the peak of its memory."""
    memory = PeakMemory()
    memory.resume()
    try:
        result = work()
    finally:
        memory.pause()
    return result, memory.bytes


def _training_steps(trainer: P2DTrainer, pool: Dataset, n_tokens: int, heads: HeadSet | None) -> StepTimes:
    """Time training steps on random rows. The longest rows warm up, so that the memory is seen at its peak."""
    size = trainer.args.per_device_train_batch_size
    rows = random_rows(trainer, pool, STEPS * size, len(pool), n_tokens)
    lengths = [len(ids) for ids in pool.with_format(None)["input_ids"]]
    longest = pool.select(sorted(range(len(pool)), key=lambda row: -lengths[row])[:size])
    batches = [
        batch
        for dataset in ((rows, rows) if trainer.args.packing else (longest, rows))
        for batch in training_batches(dataset, size, trainer.pad_token_id, trainer.args.pad_to_multiple_of)
    ]
    with training_mode(trainer) as (training_loss, make_optimizer), _adapter_on(trainer, heads):
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        return time_steps(trained, batches[: STEPS + 1], training_loss, make_optimizer)


@contextmanager
def _adapter_on(trainer: P2DTrainer, heads: HeadSet | None) -> Iterator[None]:
    """Context in which the trainer's HeadSparse adapter, if it is to get one, is on some heads of its model."""
    if trainer._head_sparse_config is None:  # another adapter is in its place already
        yield
        return
    config: HeadSparseConfig = copy.deepcopy(trainer._head_sparse_config)
    config.set_heads(heads)
    put_back = modules_to_put_back(trainer.model)
    try:
        inject_adapter_in_model(config, trainer.model, _ADAPTER)
        yield
    finally:
        put_back()


def _localize_seconds(trainer: P2DTrainer, target: Dataset) -> float:
    """
    Time localizing on a few batches and go on to all: some of it is for each token, some is not (the distances of the
    weights of `proxy`, say). What an accelerator does once, as loading kernels, is not in it.
    """
    args = trainer.args
    size = args.per_device_train_batch_size
    batches = [
        batch
        for batch in training_batches(target, size, trainer.pad_token_id)
        if (batch["labels"][:, 1:] != IGNORED).any()
    ]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    fewest = math.ceil(2 / size)  # some methods compare samples

    def seconds(count: int) -> float:
        settle(everyone=False)
        start = time.perf_counter()
        localize_heads(trainer.model, batches[:count], method=args.localize_method, seed=args.seed)
        settle(everyone=False)
        return time.perf_counter() - start

    if len(batches) <= 2 * fewest + 2:  # as many would be run twice
        return seconds(len(batches))
    more, less = seconds(fewest + 2), seconds(fewest)
    rate = max(more - less, 0.0) / sum(tokens[fewest : fewest + 2])
    return max(less - rate * sum(tokens[:fewest]), 0.0) + rate * sum(tokens)
