"""The first two stages in terms of a trainer: which heads, and which rows."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import find_executable_batch_size
from trl.trainer.sft_trainer import get_dataset_column_names

from ..efficiency import StageCosts
from ..heads import HeadScores, HeadSet, localize_heads
from ..heads.samples import IGNORED
from ..model_state import model_device
from ..selection import P2DDataSelector
from ..selection.policies import RoundRobin
from ..selection.pool import dataset_of
from ..selection.progress import quiet_datasets
from ..selection.selector import needs_heads, scores_per_target, share_of_rows
from .added_tokens import vocabulary
from .arguments import changed
from .checks import check_batches_are_left
from .config import P2DConfig
from .data_checks import check_datasets
from .data_files import save_data_files
from .reference import (
    check_reference,
    count_tokens,
    epochs_of_run,
    find_reference,
    is_sharded,
    training_batches,
)
from .state import P2DState
from .tokenized import tokenized


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

# A stream is not read to its end to draw a target from it.
STREAM_BUFFER = 1_000

# Not pushed to the Hub: Trainer leaves out what begins with an underscore.
SCORES_FOLDER = "_p2d_scores"


def choose(trainer: P2DTrainer) -> P2DState:
    """
    Localize and select, as far as the trainer's arguments ask for it. The trainer's model is what it was afterwards, and
    its `head_scores` and `selector` are set.

    Args:
        trainer (`P2DTrainer`): A trainer before its adapter is attached.
    """
    args: P2DConfig = trainer.args
    if (args.fp16_full_eval or args.bf16_full_eval) and not (is_sharded(trainer) or trainer.is_model_parallel):
        # which Trainer puts off until the training begins, in case that there is none
        trainer._move_model_to_device(trainer.model, args.device)
    here, there = model_device(trainer.model).type, trainer.accelerator.device.type
    if here != there:
        # under FSDP and DeepSpeed, Trainer leaves the model where it was loaded until it wraps it
        logger.warning(
            "The model is on %s until training starts, so it is localized and selected there. Where it fits on one "
            "%s, move it there before, or find heads and rows first with `p2d heads` and `p2d select`.",
            here,
            there,
        )
    selects = trainer._given_selector is not None or args.data_ratio < 1
    trainer._clock.set(StageCosts())  # without those of an attempt that failed
    # a collator or transform of the user's is run on the whole pool so that its rows can be scored
    with trainer._clock.stage("select") if selects else nullcontext():
        pool = tokenized(trainer, trainer.train_dataset)
    # a stream's numbers are known once it was read
    n_rows = len(pool) if isinstance(pool, Dataset) else None
    check_reference(trainer, n_rows)
    if n_rows is not None and trainer._given_selector is None and not args.packing:
        check_batches_are_left(args, share_of_rows(args.data_ratio, n_rows))
    check_datasets(trainer, pool)
    heads = scored_by = trainer.heads
    method = None
    target: Dataset | None = None
    with trainer.accelerator.autocast(), _without_virtual_tokens(trainer.model):
        if heads is None and trainer.wants_heads:
            with trainer._clock.stage("localize", trainer.model):
                target = draw_target(trainer, pool)
                trainer.head_scores = _localize(trainer, target)
                scores = trainer.head_scores
                heads, scored_by = best_heads(scores, trainer), scoring_heads(scores, trainer)
            method = trainer.head_scores.method
            logger.info("Localized %d heads by %s: %r", len(heads), method, heads)
        if selects:
            with trainer._clock.stage("select"):
                trainer.selector = selector = _selector(trainer, scored_by, target, pool)
            with trainer._clock.stage("select", selector.engine.model):
                selector.select(raw_where_another_tokenizer_reads(selector, trainer, pool))
    n_tokens = count_tokens(pool, args) if isinstance(pool, Dataset) else None
    state = P2DState(heads, method, pool_rows=n_rows, pool_tokens=n_tokens, selected_tokens=n_tokens)
    if selects:
        _note_selection(trainer, state, selector)
        if trainer.is_world_process_zero():
            save_data_files(trainer, selector, pool)
    with _without_virtual_tokens(trainer.model):
        state.reference = find_reference(
            trainer, pool, state.pool_rows, state.pool_tokens, expected_epochs(args, state)
        )
    return state


def expected_epochs(args: P2DConfig, state: P2DState) -> float:
    """Epochs that will be trained on the selected rows, which are taken to be as long as the others."""
    if state.rows is None or state.pool_rows is None or state.pool_tokens is None:
        return epochs_of_run(args, state.pool_rows, state.pool_tokens)
    n_rows = len(state.rows)
    return epochs_of_run(args, n_rows, state.pool_tokens * n_rows / state.pool_rows)


def _without_virtual_tokens(model: Any) -> AbstractContextManager[None]:
    """
    Context without the prompt that prompt learning puts in front of each row: it is random before it is trained, and the
    model's positions are not those of the row's tokens.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        disabled: AbstractContextManager[None] = model.disable_adapter()
        return disabled
    return nullcontext()


def _note_selection(trainer: P2DTrainer, state: P2DState, selector: P2DDataSelector) -> None:
    report, rows, scores = selector.report, selector.rows, selector.scores
    assert report is not None and rows is not None and scores is not None
    logger.info("Selected %d of %d rows by %s", len(rows), report.n_rows, selector.engine.scorer.name)
    if report.n_resumed:
        trainer._clock.charge("select", report.resumed_seconds, report.resumed_tokens)
        logger.info(
            "The scores of %d of %d rows are those of an earlier run, whose %.1f seconds are charged.",
            report.n_resumed,
            report.n_rows,
            report.resumed_seconds,
        )
    state.scorer = selector.engine.scorer.name
    state.scoring_heads = selector.engine.heads
    state.rows = rows
    state.scores = scores[rows].tolist()
    state.selected_tokens = None  # counted where they are put in the pool's place
    if state.pool_rows is None:
        state.pool_rows, state.pool_tokens = report.n_rows, report.n_tokens


def draw_target(trainer: P2DTrainer, pool: Dataset | IterableDataset) -> Dataset:
    """
    At most `target_samples` samples of the task, drawn with the run's seed.

    Raises:
        `ValueError`: if `max_length` leaves nothing that counts of those drawn from a pool that is to be packed.
    """
    given = trainer.target_dataset
    target = pool if given is None else tokenized(trainer, given)
    count, seed = trainer.args.target_samples, trainer.args.seed
    if isinstance(target, IterableDataset):
        drawn = dataset_of(list(target.shuffle(seed=seed, buffer_size=STREAM_BUFFER).take(count)), target)
    else:
        drawn = target.shuffle(seed=seed).select(range(min(count, len(target))))
    if given is None and trainer.args.packing and not trainer._skip_prepare_dataset:
        return _cut(trainer, drawn)
    return drawn


def _cut(trainer: P2DTrainer, drawn: Dataset) -> Dataset:
    """Rows of a pool that keeps their whole length until it is packed, cut to `max_length` as a given target is."""
    args = changed(trainer.args, shuffle_dataset=False)
    with quiet_datasets():
        cut: Dataset = trainer._prepare_dataset(drawn, trainer.processing_class, args, False, None, "target")
        # newer versions of TRL have left out the rows of which nothing counts any more
        cut = cut.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    if not len(cut):
        raise ValueError(
            f"None of the {len(drawn)} rows drawn from `train_dataset` as samples of the task has a token that counts "
            f"within `max_length`={args.max_length}. Give a `target_dataset`, or a larger `max_length`."
        )
    return cut


def _localize(trainer: P2DTrainer, target: Dataset) -> HeadScores:
    args = trainer.args

    def with_batches_of(batch_size: int) -> HeadScores:
        return localize_heads(
            trainer.model,
            training_batches(target, batch_size, trainer.pad_token_id),
            method=args.localize_method,
            seed=args.seed,
        )

    # as the training does where memory runs out
    scores = find_executable_batch_size(
        with_batches_of, args.per_device_train_batch_size, auto_find_batch_size=args.auto_find_batch_size
    )()
    # On unlike hardware, or with kernels whose sums come in any order, ranks would not agree on the last digit.
    shared: HeadScores = broadcast_object_list([scores])[0]
    return shared


def best_heads(scores: HeadScores, trainer: P2DTrainer) -> HeadSet:
    """The heads to train; where the adapter is another one, the heads that score."""
    if trainer._head_sparse_config is None:
        return scoring_heads(scores, trainer)
    return _heads_to_train(scores, trainer.args)


def scoring_heads(scores: HeadScores, trainer: P2DTrainer) -> HeadSet:
    """The heads to score rows by: those to train, or, for a scorer that is cheaper with them, of the first layers."""
    args = trainer.args
    if args.scorer != "affinity":  # the only one whose pass through the model ends above its heads
        return _heads_to_train(scores, args)
    return scores.top(args.head_ratio, first_layers=args.score_first_layers, **_bounds(args))


def _heads_to_train(scores: HeadScores, args: P2DConfig) -> HeadSet:
    return scores.top(args.head_ratio, last_layers=args.train_last_layers, **_bounds(args))


def _bounds(args: P2DConfig) -> dict[str, Any]:
    # evenly over these layers, as far as their number allows it
    return {"per_layer": args.heads_per_layer or "even", "per_group": args.heads_per_group}


def _selector(trainer: P2DTrainer, heads: HeadSet | None, target: Dataset | None, pool: Any) -> P2DDataSelector:
    """The user's selector or a new one: that of an attempt that failed is of what the arguments were then."""
    if trainer._given_selector is not None:
        return trainer._given_selector
    return make_selector(trainer, heads, draw_target(trainer, pool) if target is None else target)


def make_selector(trainer: P2DTrainer, heads: HeadSet | None, target: Dataset) -> P2DDataSelector:
    args = trainer.args
    return P2DDataSelector(
        trainer.model,
        trainer._tokenizer,
        heads=heads if needs_heads(args.scorer) else None,
        target=target,
        scorer=args.scorer,
        ratio=args.data_ratio,
        policies=[RoundRobin()] if args.round_robin and scores_per_target(args.scorer) else [],
        args=changed(args, chat_template_path=None),  # the trainer took it over by now
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        cache_dir=scores_folder(args),
    )


def scores_folder(args: P2DConfig) -> Path | None:
    """Where scores are kept until the training is over, so that a killed run goes on from there."""
    several_machines = os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")
    return None if several_machines else Path(args.output_dir) / SCORES_FOLDER


def raw_where_another_tokenizer_reads(selector: P2DDataSelector, trainer: P2DTrainer, pool: Any) -> Any:
    """A selector with another model reads the rows' text, not our tokens."""
    theirs, ours = selector.engine.processing_class, trainer._tokenizer
    if theirs is ours or vocabulary(theirs) == vocabulary(ours):  # a vocabulary takes a while to list
        return pool
    raw = pool.remove_columns(["input_ids", "labels"])
    eos = ours.eos_token
    if trainer._skip_prepare_dataset or eos is None:
        return raw
    # SFTTrainer has put it behind each text; it is another token there, or none but its letters
    columns = [
        name for name in get_dataset_column_names(raw) if name in (trainer.args.dataset_text_field, "completion")
    ]

    def without_eos(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name].removesuffix(eos) for name in columns if isinstance(row[name], str)}

    with quiet_datasets():
        return raw.map(without_eos) if columns else raw
