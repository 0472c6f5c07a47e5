"""`P2DTrainer`: `SFTTrainer` that first finds the heads and the rows that matter, then trains only those on only these."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer

from ..argument_checks import check_type
from ..efficiency import StageClock, StageCosts
from ..files import check_writable, replacing
from ..heads import HeadScores, HeadSet, ModelGeometry
from ..heads.localize import needs_weights
from ..model_checks import check_runnable
from ..report import P2DReport
from ..report.run_folder import TRAINER_STATE_NAME
from ..report.run_report import REPORT_NAME
from ..selection import P2DDataSelector
from ..selection.pool import rows_of
from ..selection.progress import no_bars
from ..selection.row_checks import check_rows
from ..selection.selector import needs_heads
from ..tuners import HeadSparseConfig
from .added_tokens import brings_tokens, learn_tokens, load_processing_class, vocabulary
from .arguments import as_p2d_config, changed
from .checks import (
    check_attention,
    check_batches_are_left,
    check_optimizer,
    check_optimizer_is_there,
    check_packing,
    check_rows_are_left,
    check_sharding,
    check_trainable,
    warn_of_small_learning_rate,
)
from .choosing import choose, scores_folder
from .config import P2DConfig
from .data_files import remove_earlier_run
from .deferred_adapter import BackwardEndsAtLowestHead, DeferredAdapter, attach, check_attachable
from .estimate import estimate_run
from .interruption import explained_interruption
from .model_card import complete_model_card
from .reference import count_tokens, has_own_loss
from .reporting import make_report, report_metrics
from .resuming import check_heads_and_reference, choosing_arguments, with_those_of_the_choice
from .run_estimate import RunEstimate
from .saved_files import load_head_scores, save_beside_model, save_heads
from .state import P2DState, check_same_choices, digest_of_rows
from .tokenized import tokenized


logger = logging.getLogger(__name__)


class P2DTrainer(SFTTrainer, DeferredAdapter):
    r"""
    Trainer for *From Parameters to Data* (P2D, arXiv 2605.21558), a drop-in for [`~trl.SFTTrainer`].

    The first call of [`~P2DTrainer.train`] chooses attention heads (with `localize_method="proxy"` those that the task moves, as
    in the paper; by default it draws them), lets some of them select rows of `train_dataset` (by default those of the first
    layers), attaches a [`HeadSparseConfig`] adapter to others (by default of the later layers) and trains it on the rows. Each
    stage is timed and the Alignment Efficiency Ratio is put into the final metrics (`train_p2d_aer`) and into
    `p2d_report.json`. The chosen heads and rows go into each checkpoint; a resumed run takes them from there, and a second
    `train()` keeps them.

    Args:
        *sft_args, **sft_kwargs:
            All arguments of [`~trl.SFTTrainer`], of which three mean more here:

            - `args`: [`P2DConfig`], or any other training arguments, for which P2D's own fields have their defaults. What
              a subclass adds comes along as attributes, methods that it overrides do not;
            - `train_dataset`: the pool that is selected from. What you make of the attribute `train_dataset` before
              `train()` is what counts; after it the attribute holds the selected rows;
            - `peft_config`: a [`HeadSparseConfig`] (its `heads` are used if it has any, else found), or another PEFT
              config. With the latter, or with a `PeftModel` as `model`, that adapter is trained on the selected rows.
        target_dataset (`Dataset` or `IterableDataset`, *optional*):
            Samples of the task that heads and rows are chosen for, of any type that `train_dataset` may have. By
            default they are drawn from `train_dataset`.
        heads (`HeadSet`, *optional*):
            The heads, if they are known; nothing is localized then.
        selector (`P2DDataSelector`, *optional*):
            What selects the rows, in place of `scorer` and `data_ratio`: with policies, another scorer, or another
            model. If it has heads and there are no others, these are trained, but those of a model with other layers or
            heads.

    Attributes:
        head_scores ([`HeadScores`] or `None`): The localization's result, once there is one.
        wants_heads (`bool`): Whether the run needs heads, for the adapter or for the scorer.
        heads ([`HeadSet`] or `None`): The selected heads, once they are known.
        selector ([`P2DDataSelector`] or `None`): What selected the rows, with their scores, once it did.
        report ([`P2DReport`] or `None`): The record of the last training run.

    Example:

    ```python
    >>> from p2d_peft import P2DConfig, P2DTrainer

    >>> trainer = P2DTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=P2DConfig(output_dir="out", learning_rate=1e-3),
    ...     train_dataset=pool,
    ...     target_dataset=target,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "p2d", "p2d_peft"]
    _name = "P2D"
    _paper = {
        "title": "From Parameters to Data: A Task-Parameter-Guided Fine-Tuning Pipeline for Efficient LLM Alignment",
        "id": "2605.21558",
        "citation": "@inproceedings{chen2026p2d,\n"
        "    title     = {{From Parameters to Data: A Task-Parameter-Guided Fine-Tuning Pipeline for Efficient LLM "
        "Alignment}},\n"
        "    author    = {Hao Chen and Qi Zhang and Liyao Li and Zhanming Shen and Wentao Ye and Lirong Gao and "
        "Ningtao Wang and Xing Fu and Xiaoyu Shen and Junbo Zhao},\n"
        "    booktitle = {International Conference on Machine Learning},\n"
        "    year      = 2026,\n    eprint    = {arXiv:2605.21558},\n}",
    }

    # what TRL and transformers declare more widely than it is here
    args: P2DConfig
    model: Any
    model_wrapped: Any
    train_dataset: Any

    def __init__(
        self,
        *sft_args: Any,
        target_dataset: Dataset | IterableDataset | None = None,
        heads: HeadSet | None = None,
        selector: P2DDataSelector | None = None,
        **sft_kwargs: Any,
    ) -> None:
        # Bound by name rather than listed: SFTTrainer's signature changes from release to release.
        given = inspect.signature(SFTTrainer).bind(*sft_args, **sft_kwargs).arguments
        model = given["model"]
        args: P2DConfig = as_p2d_config(given.get("args"), model)
        given["args"] = args
        if not args.p2d:  # what cards and tags say of a run of SFTTrainer
            self._tag_names, self._name, self._paper = SFTTrainer._tag_names, SFTTrainer._name, SFTTrainer._paper

        self.wants_heads = False
        self.heads: HeadSet | None = None
        self.head_scores: HeadScores | None = None
        self.selector = self._given_selector = selector
        self.report: P2DReport | None = None
        self.target_dataset = target_dataset
        self._head_sparse_config: HeadSparseConfig | None = None
        self._p2d_state: P2DState | None = None
        self._clock = StageClock()
        self._pool_is_next = args.p2d
        known_tokens: dict[str, int] = {}

        if args.p2d:
            check_type("target_dataset", target_dataset, (Dataset, IterableDataset), "a `datasets.Dataset`")
            for name, dataset in (("train_dataset", given.get("train_dataset")), ("target_dataset", target_dataset)):
                if isinstance(dataset, Dataset) and not len(dataset):
                    raise ValueError(f"`{name}` has no rows.")
            check_type("heads", heads, (HeadSet,), "a `HeadSet`")
            check_type("selector", selector, (P2DDataSelector,), "a `P2DDataSelector`")
            if args.should_save:
                check_writable(Path(args.output_dir, REPORT_NAME))
            self._head_sparse_config = self._deferred_config(given, heads)
            if self._head_sparse_config is None and given.get("peft_config") is None:
                check_trainable(model)
            self.wants_heads = self._head_sparse_config is not None or (
                selector is None and args.data_ratio < 1 and needs_heads(args.scorer)
            )
            if selector is not None or args.data_ratio < 1 or (self.wants_heads and not self._heads_are_given(heads)):
                check_sharding(args)
                if isinstance(model, nn.Module):
                    check_runnable(model)
            if self.wants_heads:
                # before anything is loaded or tokenized
                if isinstance(model, str):
                    is_quantized = check_attention(model, args, heads) or given.get("quantization_config") is not None
                else:
                    geometry = ModelGeometry.of(model)
                    if heads is not None:
                        geometry.check(heads)
                    is_quantized = getattr(model, "is_quantized", False)
                method = args.localize_method
                if is_quantized and needs_weights(method) and not self._heads_are_given(heads):
                    raise ValueError(
                        f"`localize_method`={method!r} needs floating-point weights, and `model` is "
                        "quantized. Use 'random' or 'gate', or give the heads."
                    )
            if self._head_sparse_config is not None and getattr(model, "is_quantized", False):
                # As attaching will. SFTTrainer casts what a quantized model trains, and these weights are not of it.
                model.requires_grad_(False)
            if self._head_sparse_config is not None and brings_tokens(args):
                if given.get("processing_class") is None:
                    given["processing_class"] = load_processing_class(model, args)
                known_tokens = vocabulary(given["processing_class"])

        super().__init__(**given)

        if args.p2d:
            self._after_init(heads, known_tokens, given.get("formatting_func"))

    def _heads_are_given(self, heads: HeadSet | None) -> bool:
        in_config = self._head_sparse_config is not None and self._head_sparse_config.heads is not None
        in_selector = self.selector is not None and self.selector.engine.heads is not None
        return heads is not None or in_config or in_selector

    def _deferred_config(self, given: dict[str, Any], heads: HeadSet | None) -> HeadSparseConfig | None:
        """The HeadSparse adapter to attach in `train()`, when the heads are known; taken from SFTTrainer's arguments."""
        config = given.get("peft_config")
        if config is None and (isinstance(given["model"], str) or not is_peft_model(given["model"])):
            config = HeadSparseConfig(task_type="CAUSAL_LM")
        if not isinstance(config, HeadSparseConfig):
            return None
        if heads is not None and config.heads is not None:
            raise ValueError("Give the heads as `heads` or in `peft_config`, not both.")
        if given.get("optimizers", (None, None))[0] is not None:
            raise ValueError(
                "`optimizers` holds an optimizer, but the weights to train do not exist before `train()`. Pass "
                "`optimizer_cls_and_kwargs` instead."
            )
        given["peft_config"] = None
        return config

    def _after_init(self, heads: HeadSet | None, known_tokens: dict[str, int], formatting_func: Any) -> None:
        args, config = self.args, self._head_sparse_config
        self._pool_is_next = False
        if self._is_vision_dataset:
            raise ValueError(
                "`train_dataset` has images, and P2D chooses heads and rows by text. Train on it with `p2d=False`."
            )
        if config is not None and known_tokens:
            if added := sorted(set(vocabulary(self._tokenizer).values()) - set(known_tokens.values())):
                learn_tokens(config, added, self.model)
        if config is not None:
            if self.optimizer_cls_and_kwargs is None:
                warn_of_small_learning_rate(args)
            check_attachable(self.model, config)
            if heads is None and config.heads is not None:
                heads = config.head_set(ModelGeometry.of(self.model))
        if heads is None and is_peft_model(self.model):
            active = self.model.peft_config[self.model.active_adapter]
            if isinstance(active, HeadSparseConfig):
                heads = active.head_set(ModelGeometry.of(self.model))
        if heads is None and self.selector is not None and self.selector.engine.heads is not None:
            of_models = [ModelGeometry.of(model).heads for model in (self.selector.engine.model, self.model)]
            if of_models[0] == of_models[1]:
                heads = self.selector.engine.heads
            elif self.wants_heads:
                logger.info("The heads of `selector` are of another model; those to train are localized.")
        self.heads = None if heads is None else ModelGeometry.of(self.model).check(heads)
        if self.target_dataset is not None and not self._skip_prepare_dataset:
            if isinstance(self.target_dataset, Dataset):
                check_rows(self.target_dataset, self.processing_class, args, formatting_func, "target_dataset")
            prepared = super()._prepare_dataset(
                self.target_dataset,
                self.processing_class,
                changed(args, shuffle_dataset=False),
                False,
                formatting_func,
                "target",
            )
            check_rows_are_left("target_dataset", self.target_dataset, prepared, args)
            self.target_dataset = prepared

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: P2DConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        is_pool, self._pool_is_next = self._pool_is_next, False  # SFTTrainer prepares the training set first
        is_plain = isinstance(dataset, Dataset) and dataset.format["type"] != "custom"
        if args.p2d and is_plain:
            of_several = "eval_dataset" if dataset_name == "eval" else f"eval_dataset['{dataset_name}']"
            name = "train_dataset" if is_pool else of_several
            check_rows(dataset, processing_class, args, formatting_func, name)
        if not is_pool:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if packing:
            check_packing(args)
            # Packing, not truncation, deals with long rows, so they keep their length.
            args = changed(args, max_length=None)
        # Rows are chosen as the user numbers them, and shuffled and packed afterwards, see _start_from.
        args = changed(args, shuffle_dataset=False)
        prepared = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        check_rows_are_left("train_dataset", dataset, prepared, args)
        return prepared

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Localize, select, attach and train; see [`~transformers.Trainer.train`] for the arguments.

        Raises:
            `ValueError`: if the checkpoint to resume from is not one of P2DTrainer's, or belongs to another pool.
            `KeyboardInterrupt`: as it comes, after a warning that says what is kept and how to go on.
        """
        with explained_interruption(self, resume_from_checkpoint) if self.args.p2d else nullcontext():
            output = self._choose_and_train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._save_log()
        return output

    def _choose_and_train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if not resume_from_checkpoint and self._p2d_state is None and self.is_world_process_zero():
            remove_earlier_run(self.args)
        if not self.args.p2d:
            self._clock.set(StageCosts())
            if resume_from_checkpoint:  # what the steps before took is not known, so there is nothing to report
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            with self._train_stage():
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._p2d_state is None:
            if self._head_sparse_config is None:
                check_optimizer(self.optimizer, self.model)
            else:
                self.drop_early_optimizer()
        if resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(f"No checkpoint to resume from was found in '{self.args.output_dir}'.")
            state, costs = P2DState.load(checkpoint)
            if self._p2d_state is not None:
                check_same_choices(self._p2d_state, state, checkpoint)
            self._clock.set(costs)
            if self._p2d_state is None:
                check_heads_and_reference(self, state, checkpoint)
                self._start_from(state)
                self.args = with_those_of_the_choice(self.args, state, checkpoint)
                self.head_scores = load_head_scores(checkpoint)
        elif self._p2d_state is None:
            check_optimizer_is_there(self)
            with no_bars() if self.args.disable_tqdm else nullcontext():
                state = choose(self)
            state.arguments = choosing_arguments(self.args)
            self._start_from(state)
        else:  # a second training is charged for itself, and again for what it builds on
            self._clock.set(self._clock.costs.without("train"))
        with self._train_stage():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if (folder := scores_folder(self.args)) is not None and self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # What a user wants to know along the way is no part of the method, nor of the reference.
        with self._clock.paused():
            return super().evaluate(*args, **kwargs)

    def estimate(self) -> RunEstimate:
        """
        Forecast what `train()` will take, from a few batches: the seconds of its stages and of the reference, the AER
        and the peak of the memory. Print what comes back; it is a table.

        The model, the random numbers and the trainer stay as they were: a later `train()` does what it would have done.

        Raises:
            `ValueError`: if `p2d` is off, the heads and rows are chosen already, or `train_dataset` is a stream.
        """
        return estimate_run(self)

    def _train_stage(self) -> AbstractContextManager[None]:
        """The context that is charged to training."""
        if has_own_loss(self):  # which SFTTrainer's own would count
            return self._clock.stage("train", self.model)
        return self._clock.stage("train", tokens=lambda: self._total_train_tokens)  # of all processes

    def _start_from(self, state: P2DState) -> None:
        """Put the chosen rows in the place of the pool and attach the adapter to the chosen heads."""
        pool = self.train_dataset
        if isinstance(pool, Dataset) and len(pool) != state.pool_rows:
            raise ValueError(
                f"The checkpoint's rows were selected from {state.pool_rows} rows, but `train_dataset` has {len(pool)}; "
                "pass the same dataset to resume."
            )
        selected = pool if state.rows is None else rows_of(pool, state.rows)
        digest = digest_of_rows(selected)
        if None not in (digest, state.rows_digest) and digest != state.rows_digest:
            raise ValueError(
                "The checkpoint's rows were selected from another `train_dataset`: in this one the rows of the same numbers "
                "hold other tokens. To resume, pass the same dataset in the same order, tokenized in the same way."
            )
        state.rows_digest = digest or state.rows_digest
        if state.selected_tokens is None and state.rows is not None:
            state.selected_tokens = count_tokens(tokenized(self, selected), self.args)
        if not self._skip_prepare_dataset:
            if self.args.packing:
                selected = super()._prepare_dataset(selected, self.processing_class, self.args, True, None, "selected")
            elif self.args.shuffle_dataset:
                selected = selected.shuffle(seed=self.args.seed)
        check_batches_are_left(self.args, selected)
        if self._head_sparse_config is not None:
            assert state.heads is not None
            self.model = attach(self.model, self._head_sparse_config, state.heads, self.args)
            self.model_wrapped = self.model
            if self.args.activation_offloading:  # what is a weight, and stays where it is
                self.maybe_activation_offload_context.update_model_params(self.model)
            if not (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                self.model.get_base_model().disable_input_require_grads()  # PEFT's hook, which Trainer's would hide
                self.add_callback(BackwardEndsAtLowestHead)
        # only now: what went wrong before leaves a trainer that can be trained again
        self.heads, self.train_dataset, self._p2d_state = state.heads, selected, state

    @property
    def pad_token_id(self) -> int:
        """
        What batches are padded with, behind a mask, so that any token will do. `SFTTrainer` has seen to it that the tokenizer
        has a padding token, but where the user's collator pads.
        """
        token_ids: tuple[int | None, ...] = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((token_id for token_id in token_ids if token_id is not None), 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs and "train" in self._clock.costs.seconds:
            # the training's own last entry: trackers and TrainOutput.metrics get the AER with it
            self.report = make_report(self, self._p2d_state, self._clock.costs_of_all())
            if self.args.p2d:
                logs.update(report_metrics(self.report))
            if self.is_world_process_zero():
                self._save_report(self.report)
        super().log(logs, start_time)

    def _save_report(self, report: P2DReport) -> None:
        folder = Path(self.args.output_dir)
        try:
            report.save(folder / REPORT_NAME)
            # what the report is read with, also where nobody saves the model
            save_heads(folder, self.model, self.heads, self.head_scores, picture=False)
        except OSError as error:  # the trained weights are worth more, and not saved yet
            logger.warning("The report is in `trainer.report` alone. %s", error)

    def _save_log(self) -> None:
        """Save what `save_state` does: `p2d report` draws the log, and the checkpoints' end before the training does."""
        if not self.args.should_save:
            return
        try:
            with replacing(Path(self.args.output_dir, TRAINER_STATE_NAME)) as temporary:
                self.state.save_to_json(str(temporary))
        except (OSError, TypeError, ValueError) as error:  # a callback may log what is not for JSON
            logger.warning("The training's log is in `trainer.state` alone: %s", error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Trainer saves weights in shards beside the optimizer's state, and then without `_save`
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save_beside(output_dir, is_whole=False)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self._save_beside(output_dir, is_whole=state_dict is None)

    def _save_beside(self, output_dir: str | None, is_whole: bool) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if self._p2d_state is not None:
                self._p2d_state.save(folder, self._clock.costs)
            save_beside_model(self, folder, is_whole)
            is_result = self.args.p2d and self.report is not None and not self.is_in_train
            if is_result and folder.resolve() == Path(self.args.output_dir).resolve():
                # the last checkpoint's card says that the training was not finished
                self.create_model_card(model_name=(self.args.hub_model_id or folder.resolve().name).split("/")[-1])

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` and, of a P2D run, the head map into `output_dir`; see [`~trl.SFTTrainer`]."""
        # `push_to_hub` and callbacks call this on the main process alone, where waiting for the others would never end
        with self._clock.paused(everyone=False):
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                complete_model_card(self, model_name)
