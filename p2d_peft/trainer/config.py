"""`P2DConfig`: the arguments of `P2DTrainer`."""

import math
import os
from dataclasses import dataclass, field
from typing import Optional, get_args

from trl import SFTConfig

from ..argument_checks import check_choice, check_count, check_number, check_share, check_type
from ..heads.localize import LocalizeMethod
from ..selection.selector import ScorerName
from .measured_run import MeasuredRun


# Optional[...] rather than X | None, and no `from __future__ import annotations`: HfArgumentParser reads the types.
@dataclass
class P2DConfig(SFTConfig):
    r"""
    Configuration of [`P2DTrainer`]: all of [`~trl.SFTConfig`] with its defaults, and what is P2D's own.

    Parameters:
        p2d (`bool`, *optional*, defaults to `True`):
            Whether to localize and select. `False` makes the trainer an `SFTTrainer`, which also leaves a
            `p2d_report.json`: without a `peft_config` that is the reference for the runs with P2D.
        head_ratio (`float`, *optional*, defaults to `0.1`):
            Share of the attention heads to select, in (0, 1]. The paper takes 10 %.
        heads_per_layer (`int`, *optional*):
            Select at most so many heads of one layer. By default as many as an even spread over the layers needs,
            rounded up: the best heads of all layers together crowd into a few of them, and do worse
            (`docs/localization.md`). With the number of a layer's heads there is no bound.
        heads_per_group (`int`, *optional*):
            Select at most so many of the heads that share their keys and values. By default there is no such bound.
        train_last_layers (`float`, *optional*, defaults to 0.67):
            Train heads of this share of the layers, counted from the last one, in (0, 1]: the backward pass ends below
            them. More layers are taken where these have too few heads for `head_ratio`. 1.0 is the paper's form: heads of
            all layers, which take longer and learned no more on four tasks. 0.33 takes about three quarters of the time
            of all, and was as good on two of the four, but clearly worse on the two whose
            answers stand in the question (`docs/results.md`).
        localize_method (`str`, *optional*, defaults to `"random"`):
            How heads are found: `"proxy"` (the paper's), `"taylor"`, `"gate"`, `"fisher"`, `"gain"`, `"gain_sgd"`,
            `"agreement"`, `"ablation"`, `"trained"`, `"magnitude"` or `"random"`; see [`localize_heads`]. By default they are
            drawn with `seed`, evenly over the layers, which costs nothing: over eight tasks no method's heads learned more,
            beyond the noise (`docs/localization.md`).
        data_ratio (`float`, *optional*, defaults to `0.1`):
            Share of the rows of `train_dataset` to train on, in (0, 1]. The paper takes 10 %.
        scorer (`str`, *optional*, defaults to `"affinity"`):
            How rows are scored: `"affinity"`, `"icl"` (the paper's), `"influence"`, `"gradient"`, `"less"`, `"rds"`,
            `"ifd"`, `"bm25"`, `"perplexity"`, `"length"` or `"random"`; see [`P2DDataSelector`].
        score_first_layers (`float`, *optional*, defaults to 0.2):
            Let `"affinity"` score rows by the best heads of this share of the layers, counted from the first one, in
            (0, 1], as many as are trained: the forward pass ends above them. More layers are taken where these have too
            few heads. 1.0 is the paper's form where `train_last_layers` is 1.0, too: the heads that are trained score the
            rows. Heads that you give score as they are.
        round_robin (`bool`, *optional*, defaults to `True`):
            Let the target's samples take turns in picking rows, with the scorers that compare a row with each of them
            (`"affinity"`, `"gradient"`, `"less"`, `"rds"`, `"bm25"`). `False` keeps the rows with the best scores, as
            the paper does: in a pool of one task these are too much alike (`docs/results.md`).
        target_samples (`int`, *optional*, defaults to `100`):
            How many samples of the task localizing and selecting look at: at most so many of `target_dataset`, or, where
            there is none, so many rows drawn from `train_dataset`.
        reference_seconds (`float`, *optional*):
            Measured seconds of full-parameter SFT on the whole of `train_dataset` for the same epochs, if you have them.
        reference_report (`str`, *optional*):
            In place of `reference_seconds`: the file, or its folder, that such a run left. A run with `p2d=False` leaves
            a `p2d_report.json`; the `trainer_state.json`, `train_results.json` or `all_results.json` of any transformers
            Trainer will do, too. Its seconds per epoch are taken.
        reference_steps (`int`, *optional*, defaults to `3`):
            Without `reference_seconds` and `reference_report`: how many steps of full fine-tuning to time for an
            estimate, after one to warm up. They need the memory of full fine-tuning and leave the model as it was. 0: no
            estimate, no AER.
        report_samples (`int`, *optional*, defaults to `10`):
            How many of the rows with the best and with the worst scores are written as text into `_p2d_samples.json` in
            `output_dir`, for `p2d report` to show, beside the values of columns that have few. Nothing that begins with an
            underscore is pushed to the Hub. 0: the file is not written, and nothing of the data is quoted anywhere.
    """

    p2d: bool = field(
        default=True,
        metadata={"help": "Whether to localize and select. False makes the trainer an SFTTrainer."},
    )
    head_ratio: float = field(
        default=0.1,
        metadata={"help": "Share of the attention heads to select, in (0, 1]. The paper takes 10 %%."},
    )
    heads_per_layer: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Select at most so many heads of one layer. By default as many as an even spread over the layers "
            "needs, rounded up. With the number of a layer's heads there is no bound."
        },
    )
    heads_per_group: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={"help": "Select at most so many of the heads that share their keys and values."},
    )
    train_last_layers: float = field(
        default=0.67,
        metadata={
            "help": "Train heads of this share of the layers, counted from the last one, in (0, 1]. The backward pass ends "
            "below them. 1.0, as in the paper: heads of all layers."
        },
    )
    localize_method: LocalizeMethod = field(
        default="random",
        metadata={
            "help": "How heads are found. random: by a draw, as no other method's heads were seen to learn more. proxy (the paper's): "
            "by their shift in a short training; taylor, fisher, gain, gain_sgd, agreement: by gradients of their "
            "weights; gate, ablation: by what the loss is without them, also on quantized models; trained: by training "
            "each, on small models; magnitude: by the norm of their weights."
        },
    )
    data_ratio: float = field(
        default=0.1,
        metadata={"help": "Share of the rows of `train_dataset` to train on, in (0, 1]. The paper takes 10 %%."},
    )
    scorer: ScorerName = field(
        default="affinity",
        metadata={
            "help": "How rows are scored: by the selected heads (affinity, icl, influence, gradient), by other methods "
            "(less, rds, ifd, bm25) or by controls (perplexity, length, random)."
        },
    )
    score_first_layers: float = field(
        default=0.2,
        metadata={
            "help": "Let affinity score rows by heads of this share of the layers, counted from the first one, in (0, 1]. "
            "The forward pass ends above them. 1.0, as in the paper: by the best heads of all layers."
        },
    )
    round_robin: bool = field(
        default=True,
        metadata={
            "help": "Let the target's samples take turns in picking rows, with the scorers that compare a row with each of "
            "them. False keeps the rows with the best scores, as in the paper."
        },
    )
    target_samples: int = field(
        default=100,
        metadata={
            "help": "How many samples of the task localizing and selecting look at: at most so many of "
            "`target_dataset`, or, where there is none, so many rows drawn from `train_dataset`."
        },
    )
    reference_seconds: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Measured seconds of full-parameter SFT on the whole of `train_dataset` for the same epochs."
        },
    )
    reference_report: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "In place of `reference_seconds`: the file, or its folder, that a measured run of full fine-tuning "
            "left: the p2d_report.json of a run with `p2d=False`, or the trainer_state.json, train_results.json or "
            "all_results.json of any transformers Trainer."
        },
    )
    reference_steps: int = field(
        default=3,
        metadata={
            "help": "Without `reference_seconds` and `reference_report`: how many steps of full fine-tuning to time "
            "for an estimate, after one to warm up. They need the memory of full fine-tuning. 0: no estimate, no AER."
        },
    )
    report_samples: int = field(
        default=10,
        metadata={
            "help": "How many of the rows with the best and with the worst scores are written as text into "
            "`_p2d_samples.json` for `p2d report`, which is not pushed to the Hub, beside the values of columns that have "
            "few. 0: the file is not written, and nothing of the data is quoted anywhere."
        },
    )

    def __post_init__(self) -> None:
        for name in ("head_ratio", "train_last_layers", "data_ratio", "score_first_layers"):
            check_share(name, getattr(self, name))
        for name in ("heads_per_layer", "heads_per_group"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_choice("localize_method", self.localize_method, get_args(LocalizeMethod))
        check_choice("scorer", self.scorer, get_args(ScorerName))
        check_count("target_samples", self.target_samples)
        if self.reference_seconds is not None:
            check_number("reference_seconds", self.reference_seconds, "a positive number")
            if not 0 < self.reference_seconds < math.inf:
                raise ValueError(f"`reference_seconds` must be positive, got {self.reference_seconds}.")
        if self.reference_report is not None:
            if self.reference_seconds is not None:
                raise ValueError(
                    f"Give `reference_seconds` ({self.reference_seconds}) or `reference_report` "
                    f"('{self.reference_report}'), not both."
                )
            check_type("reference_report", self.reference_report, (str, os.PathLike), "a path")
            self.reference_report = os.fspath(self.reference_report)  # arguments are written as JSON
            MeasuredRun.read(self.reference_report)  # a file that will not do is told of at once
        for name in ("reference_steps", "report_samples"):
            check_count(name, getattr(self, name), least=0)
        for name in ("p2d", "round_robin"):
            check_type(name, getattr(self, name), (bool,), "True or False")
        super().__post_init__()
