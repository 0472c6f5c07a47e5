"""`P2DTrainer`: `SFTTrainer` that first finds the heads and the rows that matter, then trains only those on only these."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id

from ..efficiency import Reference, StageClock, alignment_efficiency_ratio, estimate_reference
from ..heads import HeadScores, HeadSet, ModelGeometry, localize_heads
from ..model_state import model_device, model_id, preserved_state
from ..report.run_report import REPORT_NAME, P2DReport
from ..selection import P2DDataSelector
from ..selection.selector import SCORE_COLUMN
from ..tuners import HeadSparseConfig
from .config import P2DConfig
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
            if peft_config is None and not is_peft_model(given["model"]):
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

    def _prepare_dataset(  # type: ignore[override]
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
        if self._p2d_state is None:
            checkpoint = resume_from_checkpoint or None
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
                if checkpoint is None:
                    raise ValueError(f"No checkpoint to resume from was found in '{self.args.output_dir}'.")
            if checkpoint is None:
                state = self._choose()
            else:
                state, stage_seconds = P2DState.load(checkpoint)
                self._clock.add(stage_seconds)
            self._start_from(state)
        with self._clock.stage("train"):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _choose(self) -> P2DState:
        """Run the first two stages."""
        args, pool = self.args, self.train_dataset
        target = self.target_dataset if self.target_dataset is not None else pool
        target = target.shuffle(seed=args.seed).select(range(min(args.target_samples, len(target))))
        heads, method = self.heads, None
        with self.accelerator.autocast():
            needs_heads = self._head_sparse_config is not None or args.scorer in ("affinity", "icl")
            if heads is None and needs_heads:
                method = args.localize_method
                with self._clock.stage("localize"):
                    self.head_scores = localize_heads(
                        self.model,
                        self._batches(target),
                        method=method,
                        seed=args.seed,  # type: ignore[arg-type]
                    )
                    heads = self.head_scores.top(args.head_ratio, per_layer=args.heads_per_layer)
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
            pool_tokens=_n_tokens(pool),
            reference=self._reference(pool),
        )

    def _start_from(self, state: P2DState) -> None:
        """Put the chosen rows in the place of the pool and attach the adapter to the chosen heads."""
        pool = self.train_dataset
        if len(pool) != state.pool_rows:
            raise ValueError(
                f"The checkpoint's rows were selected from {state.pool_rows} rows, but `train_dataset` has {len(pool)}; "
                "pass the same dataset to resume."
            )
        selected = pool.select(state.rows)
        if SCORE_COLUMN in selected.column_names:
            selected = selected.remove_columns(SCORE_COLUMN)
        selected = selected.add_column(SCORE_COLUMN, state.scores)
        self._selected_rows, self._selected_tokens = len(selected), _n_tokens(selected)
        self.train_dataset = self._packed(selected) if self.args.packing else selected
        self.heads = state.heads
        if self._head_sparse_config is not None:
            config = copy.deepcopy(self._head_sparse_config)
            config.set_heads(state.heads)
            self.model = self.model_wrapped = get_peft_model(self.model, config)
            if (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                # Reentrant checkpoints pass no gradient on unless their input needs one. The others do, and then
                # the backward pass can end at the lowest chosen head.
                self.model.enable_input_require_grads()
        self._p2d_state = state

    def _packed(self, dataset: Dataset) -> Dataset:
        return super()._prepare_dataset(dataset, self.processing_class, self.args, True, None, "selected")

    def _batches(self, dataset: Dataset) -> list[dict[str, torch.Tensor]]:
        """Batches as the training would make them, but never padding-free, without which row meets row."""
        collate = DataCollatorForLanguageModeling(pad_token_id=self._tokenizer.pad_token_id)
        size = self.args.per_device_train_batch_size
        columns = [column for column in ("input_ids", "labels") if column in dataset.column_names]
        rows = dataset.select_columns(columns).with_format(None).to_list()
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _reference(self, pool: Dataset) -> Reference | None:
        """The reference as given, or estimated if that is wanted and possible. Not charged to any stage."""
        args = self.args
        if args.reference_seconds is not None:
            return Reference(args.reference_seconds / args.num_train_epochs, "given")
        if args.reference_steps == 0:
            return None
        size = args.per_device_train_batch_size
        n_rows = min(len(pool), (args.reference_steps + 1) * size)
        rows = pool.shuffle(seed=args.seed).select(range(n_rows))
        batches = self._batches(rows)
        device = model_device(self.model)
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
        optimizer_class, optimizer_kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args)
        steps_per_epoch = len(pool) / (size * args.gradient_accumulation_steps)

        def training_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.accelerator.autocast():
                return self.model(**batch, use_cache=False, fused_lm_head=True).loss

        checkpointing = args.gradient_checkpointing and not self.model.is_gradient_checkpointing
        try:
            with preserved_state(self.model):
                self.model.train()
                if checkpointing:
                    self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
                return estimate_reference(
                    self.model,
                    batches,
                    training_loss,
                    lambda parameters: optimizer_class(parameters, **optimizer_kwargs),
                    pool_tokens=_n_tokens(pool),
                    steps_per_epoch=max(1, round(steps_per_epoch)),
                )
        except (ValueError, torch.OutOfMemoryError) as error:
            logger.warning(
                "The reference could not be estimated, so there will be no AER: %s Pass `reference_seconds` if you "
                "have measured it, or `reference_steps=0` to go without.",
                error,
            )
            return None
        finally:
            if checkpointing:
                self.model.gradient_checkpointing_disable()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.p2d and "train_runtime" in logs:
            # the training's own last entry: trackers and TrainOutput.metrics get the AER with it
            self.report = self._make_report()
            logs.update(_metrics(self.report))
            if self.is_world_process_zero():
                self.report.save(os.path.join(self.args.output_dir, REPORT_NAME))
        super().log(logs, start_time)

    def _make_report(self) -> P2DReport:
        state = self._p2d_state
        assert state is not None
        seconds = self._clock.seconds
        epochs = float(self.state.epoch or 0.0)
        reference = state.reference
        reference_seconds = reference.seconds_per_epoch * epochs if reference is not None and epochs > 0 else None
        aer = None if reference_seconds is None else alignment_efficiency_ratio(seconds, reference_seconds)
        model = self.accelerator.unwrap_model(self.model)
        parameters = list(model.parameters())
        return P2DReport(
            stage_seconds=seconds,
            epochs=epochs,
            reference_seconds=reference_seconds,
            reference_source=reference.source if reference is not None else None,
            reference_relative_error=reference.relative_error if reference is not None else None,
            aer=aer,
            speedup=None if aer is None else 1 / aer,
            model=model_id(model),
            seed=self.args.seed,
            n_heads=len(ModelGeometry.of(model).heads),
            heads=state.heads.to_dict()["heads"] if state.heads is not None else None,
            localize_method=state.localize_method,
            pool_rows=state.pool_rows,
            pool_tokens=state.pool_tokens,
            selected_rows=self._selected_rows,
            selected_tokens=self._selected_tokens,
            scorer=self.args.scorer,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            total_parameters=sum(p.numel() for p in parameters),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._p2d_state is not None and self.args.should_save:
            self._p2d_state.save(Path(output_dir or self.args.output_dir), self._clock.seconds)


def _as_p2d_config(args: TrainingArguments | None, model: Any) -> P2DConfig:
    """Any training arguments as a `P2DConfig`, as `SFTTrainer` makes an `SFTConfig` of them."""
    if isinstance(args, P2DConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return P2DConfig(f"{name.split('/')[-1]}-P2D")
    # to_dict hides the token
    return P2DConfig(**{**args.to_dict(), "hub_token": args.hub_token})


def _unshuffled(args: P2DConfig) -> P2DConfig:
    args = copy.copy(args)
    args.shuffle_dataset = False
    return args


def _n_tokens(dataset: Dataset) -> int:
    return sum(map(len, dataset.with_format(None)["input_ids"]))


def _metrics(report: P2DReport) -> dict[str, float]:
    metrics: dict[str, float] = {f"train_p2d_{stage}_seconds": value for stage, value in report.stage_seconds.items()}
    if report.aer is not None and report.speedup is not None and report.reference_seconds is not None:
        metrics["train_p2d_reference_seconds"] = report.reference_seconds
        metrics["train_p2d_aer"] = report.aer
        metrics["train_p2d_speedup"] = report.speedup
    metrics["train_p2d_selected_rows"] = report.selected_rows
    metrics["train_p2d_selected_tokens"] = report.selected_tokens
    return metrics
