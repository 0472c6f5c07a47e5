"""`P2DTrainer`: `SFTTrainer` that first finds the heads and the rows that matter, then trains only those on only these."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..efficiency import StageClock
from ..heads import HeadScores, HeadSet, ModelGeometry, localize_heads
from ..report import P2DReport
from ..report.run_report import REPORT_NAME
from ..selection import P2DDataSelector
from ..selection.pool import kept_rows
from ..selection.selector import needs_heads
from ..tuners import HeadSparseConfig
from .config import P2DConfig
from .model_card import complete_model_card
from .reference import count_tokens, find_reference, training_batches
from .reporting import make_report, report_metrics
from .saved_files import load_head_scores, save_beside_model
from .state import P2DState


logger = logging.getLogger(__name__)


class P2DTrainer(SFTTrainer):
    r"""
    Trainer for *From Parameters to Data* (P2D, arXiv 2605.21558), a drop-in for [`~trl.SFTTrainer`].

    The first call of [`~P2DTrainer.train`] localizes the attention heads that the task moves, lets them select rows of
    `train_dataset`, attaches a [`HeadSparseConfig`] adapter to the heads and trains it on the rows. Each stage is timed
    and the Alignment Efficiency Ratio is put into the final metrics (`train_p2d_aer`) and into `p2d_report.json`. The
    chosen heads and rows go into each checkpoint; a resumed run takes them from there, and a second `train()` keeps
    them.

    Args:
        *sft_args, **sft_kwargs:
            All arguments of [`~trl.SFTTrainer`], of which three mean more here:

            - `args`: [`P2DConfig`], or any other training arguments, for which P2D's own fields have their defaults;
            - `train_dataset`: the pool that is selected from. After `train()` the attribute holds the selected rows;
            - `peft_config`: a [`HeadSparseConfig`] (its `heads` are used if it has any, else found), or another PEFT
              config. With the latter, or with a `PeftModel` as `model`, that adapter is trained on the selected rows.
        target_dataset (`Dataset`, *optional*):
            Samples of the task that heads and rows are chosen for, of any type that `train_dataset` may have. By
            default they are drawn from `train_dataset`.
        heads (`HeadSet`, *optional*):
            The heads, if they are known; nothing is localized then.

    Attributes:
        head_scores ([`HeadScores`] or `None`): The localization's result, once there is one.
        heads ([`HeadSet`] or `None`): The selected heads, once they are known.
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
        "title": "From Parameters to Data",
        "id": "2605.21558",
        "citation": "@article{p2d2026,\n    title        = {{From Parameters to Data}},\n"
        "    year         = 2026,\n    eprint       = {arXiv:2605.21558},\n}",
    }

    # what TRL and transformers declare more widely than it is here
    args: P2DConfig
    model: Any
    train_dataset: Any

    def __init__(
        self,
        *sft_args: Any,
        target_dataset: Dataset | None = None,
        heads: HeadSet | None = None,
        **sft_kwargs: Any,
    ) -> None:
        # Bound by name rather than listed: SFTTrainer's signature changes from release to release.
        given = inspect.signature(SFTTrainer).bind(*sft_args, **sft_kwargs).arguments
        given["args"] = _as_p2d_config(given.get("args"), given["model"])
        args: P2DConfig = given["args"]
        peft_config = given.get("peft_config")
        if not args.p2d:  # what cards and tags say of a run of SFTTrainer
            self._tag_names, self._name, self._paper = SFTTrainer._tag_names, SFTTrainer._name, SFTTrainer._paper

        self.heads: HeadSet | None = None
        self.head_scores: HeadScores | None = None
        self.report: P2DReport | None = None
        self._head_sparse_config: HeadSparseConfig | None = None
        self._p2d_state: P2DState | None = None
        self._clock = StageClock()

        if args.p2d:
            if not isinstance(given.get("train_dataset"), Dataset):
                raise TypeError(
                    "`train_dataset` must be a `datasets.Dataset` to select from, got "
                    f"{type(given.get('train_dataset')).__name__}. Streams are not supported yet."
                )
            if target_dataset is not None and not isinstance(target_dataset, Dataset):
                raise TypeError(f"`target_dataset` must be a `datasets.Dataset`, got {type(target_dataset).__name__}.")
            if heads is not None and not isinstance(heads, HeadSet):
                raise TypeError(f"`heads` must be a `HeadSet`, got {type(heads).__name__}.")
            is_loaded = not isinstance(given["model"], str)
            if is_loaded:  # a model that is yet to be loaded is checked afterwards
                ModelGeometry.of(given["model"])
            if peft_config is None and not (is_loaded and is_peft_model(given["model"])):
                peft_config = HeadSparseConfig(task_type="CAUSAL_LM")
            if isinstance(peft_config, HeadSparseConfig):
                if heads is not None and peft_config.heads is not None:
                    raise ValueError("Give the heads as `heads` or in `peft_config`, not both.")
                if given.get("optimizers", (None, None))[0] is not None:
                    raise ValueError(
                        "`optimizers` holds an optimizer, but the weights to train do not exist before `train()`. Pass "
                        "`optimizer_cls_and_kwargs` instead."
                    )
                # attached in train(), when the heads are known
                self._head_sparse_config = peft_config
                given["peft_config"] = None

        super().__init__(**given)

        self.target_dataset = target_dataset
        if args.p2d:
            geometry = ModelGeometry.of(self.model)
            if self._head_sparse_config is not None and self._head_sparse_config.heads is not None:
                heads = self._head_sparse_config.head_set(geometry)
            self.heads = None if heads is None else geometry.check(heads)
            if target_dataset is not None and not self._skip_prepare_dataset:
                self.target_dataset = super()._prepare_dataset(
                    target_dataset,
                    self.processing_class,
                    _unshuffled(args),
                    False,
                    given.get("formatting_func"),
                    "target",
                )

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: P2DConfig,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        if args.p2d and packing and dataset_name == "train":
            # Rows are chosen as samples and packed afterwards, see _start_from. Packing, not truncation, deals with
            # long rows, so they keep their length.
            packing, args = False, copy.copy(args)
            args.max_length = None
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

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
        """
        if not self.args.p2d:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(f"No checkpoint to resume from was found in '{self.args.output_dir}'.")
            state, stage_seconds = P2DState.load(checkpoint)
            self._clock.set(stage_seconds)
            if self._p2d_state is None:
                self.head_scores = load_head_scores(checkpoint)
                self._start_from(state)
        elif self._p2d_state is None:
            self._start_from(self._choose())
        else:  # a second training is charged for itself, and again for what it builds on
            self._clock.set({name: value for name, value in self._clock.seconds.items() if name != "train"})
        with self._clock.stage("train"):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # What a user wants to know along the way is no part of the method, nor of the reference.
        with self._clock.paused():
            return super().evaluate(*args, **kwargs)

    def _choose(self) -> P2DState:
        """Run the first two stages."""
        args, pool = self.args, self.train_dataset
        target = self.target_dataset if self.target_dataset is not None else pool
        target = target.shuffle(seed=args.seed).select(range(min(args.target_samples, len(target))))
        heads, method = self.heads, None
        with self.accelerator.autocast():
            with_heads = self._head_sparse_config is not None or needs_heads(args.scorer)
            if heads is None and with_heads:
                method = args.localize_method
                with self._clock.stage("localize"):
                    self.head_scores = localize_heads(
                        self.model,
                        training_batches(target, args.per_device_train_batch_size, self.pad_token_id),
                        method=method,
                        seed=args.seed,
                    )
                    heads = self.head_scores.top(
                        args.head_ratio, per_layer=args.heads_per_layer, per_group=args.heads_per_group
                    )
                logger.info("Localized %d heads by %s: %r", len(heads), method, heads)
            with self._clock.stage("select"):
                selector = P2DDataSelector(
                    self.model,
                    self._tokenizer,
                    heads=heads,
                    target=target,
                    scorer=args.scorer,
                    ratio=args.data_ratio,
                    args=args,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                )
                scores = selector.score(pool)
                rows = selector.choose(scores)
            logger.info("Selected %d of %d rows by %s", len(rows), len(pool), args.scorer)
        return P2DState(
            heads=heads,
            localize_method=method,
            rows=rows,
            scores=scores[rows].tolist(),
            pool_rows=len(pool),
            pool_tokens=count_tokens(pool),
            selected_tokens=count_tokens(pool.select(rows)),
            reference=find_reference(self, pool),
        )

    def _start_from(self, state: P2DState) -> None:
        """Put the chosen rows in the place of the pool and attach the adapter to the chosen heads."""
        pool = self.train_dataset
        if len(pool) != state.pool_rows:
            raise ValueError(
                f"The checkpoint's rows were selected from {state.pool_rows} rows, but `train_dataset` has {len(pool)}; "
                "pass the same dataset to resume."
            )
        selected = kept_rows(pool.select(state.rows), state.scores)
        self.train_dataset = self._packed(selected) if self.args.packing else selected
        self.heads = state.heads
        if self._head_sparse_config is not None:
            config = copy.deepcopy(self._head_sparse_config)
            config.set_heads(state.heads)
            self.model = self.model_wrapped = get_peft_model(self.model, config)
            if (self.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
                # Reentrant checkpoints pass no gradient on unless their input needs one. The others do, and then
                # the backward pass can end at the lowest chosen head.
                self.model.enable_input_require_grads()
        self._p2d_state = state

    def _packed(self, dataset: Dataset) -> Dataset:
        return super()._prepare_dataset(dataset, self.processing_class, self.args, True, None, "selected")

    @property
    def pad_token_id(self) -> int:
        """What batches are padded with; `SFTTrainer` has seen to it that the tokenizer has a padding token."""
        token_id: int = self._tokenizer.pad_token_id
        return token_id

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.p2d and "train_runtime" in logs:
            # the training's own last entry: trackers and TrainOutput.metrics get the AER with it
            assert self._p2d_state is not None
            self.report = make_report(self, self._p2d_state, self._clock.seconds)
            logs.update(report_metrics(self.report))
            if self.is_world_process_zero():
                self.report.save(os.path.join(self.args.output_dir, REPORT_NAME))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if self._p2d_state is not None:
                self._p2d_state.save(folder, self._clock.seconds)
            save_beside_model(self, folder, is_whole=state_dict is None)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` and, of a P2D run, the head map into `output_dir`; see [`~trl.SFTTrainer`]."""
        with self._clock.paused():
            super().create_model_card(model_name, dataset_name, tags)
            if self.is_world_process_zero():
                complete_model_card(self, model_name)


def _as_p2d_config(args: TrainingArguments | None, model: Any) -> P2DConfig:
    """Any training arguments as a `P2DConfig`, as `SFTTrainer` makes an `SFTConfig` of them."""
    if isinstance(args, P2DConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return P2DConfig(f"{name.split('/')[-1]}-P2D")
    # to_dict hides every token, those of the tokenizer, too
    hidden = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name.endswith("_token")}
    return P2DConfig(**{**args.to_dict(), **hidden})


def _unshuffled(args: P2DConfig) -> P2DConfig:
    args = copy.copy(args)
    args.shuffle_dataset = False
    return args
