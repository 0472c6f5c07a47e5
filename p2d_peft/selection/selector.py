"""`P2DDataSelector`: step two of the method, which rows of a pool the selected heads want."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..heads import HeadSet, ModelGeometry
from ..model_state import model_device, preserved_state
from . import affinity, icl, perplexity, random
from .samples import Samples, prepare_samples
from .scoring import Scorer, ScoringContext


logger = logging.getLogger(__name__)

ScorerName = Literal["affinity", "icl", "perplexity", "random"]
SCORE_COLUMN = "p2d_score"
_SCORERS: dict[str, Scorer] = {
    "affinity": affinity.SCORER,
    "icl": icl.SCORER,
    "perplexity": perplexity.SCORER,
    "random": random.SCORER,
}


class P2DDataSelector:
    """
    Scores the rows of a pool and keeps the best of them (P2D section 3.2.2).

    It takes what `SFTTrainer` takes as `train_dataset`: language modeling or prompt-completion, plain or
    conversational, or pre-tokenized; and it counts the tokens that SFTTrainer would train on.

    Args:
        model (`nn.Module`):
            The causal language model that will be trained; after scoring it is what it was before.
        processing_class (`PreTrainedTokenizerBase`):
            Its tokenizer.
        heads (`HeadSet`, *optional*):
            The selected heads, as `localize_heads(...).top(0.1)` gives them. Needed by `affinity` and `icl`.
        target (`Dataset`, *optional*):
            A few samples of the task, of any type that a pool may have. Needed by `affinity` and `icl`.
        scorer (`str`, *optional*, defaults to `"affinity"`):
            - `"affinity"`: pooled outputs of the selected heads against the target's; part of one forward pass;
            - `"icl"`: the paper's, attention of the selected heads to the sample as a demonstration, weighted by the
              likelihood of the target's answers;
            - `"perplexity"`: the hardest samples; a control;
            - `"random"`: a seeded draw; the control.
        ratio (`float`, *optional*):
            Share of the pool's rows to keep, in (0, 1]; rounded, at least one row. 0.1, the paper's, if neither `ratio`
            nor `num_samples` is given.
        num_samples (`int`, *optional*):
            Number of rows to keep, in place of `ratio`.
        args (`SFTConfig`, *optional*):
            How rows become tokens: `max_length`, `dataset_text_field`, `completion_only_loss`, `assistant_only_loss`
            and the like. Pass the config you will train with; its other fields are not read.
        formatting_func (`Callable`, *optional*):
            As in `SFTTrainer`: from a row to its text.
        batch_size (`int`, *optional*, defaults to 8):
            Rows a forward pass.
        seed (`int`, *optional*, defaults to 42):
            The same seed gives the same rows.

    Raises:
        `ValueError`: if the scorer is unknown or lacks what it needs, `heads` does not fit the model, or `ratio`,
            `num_samples` or `batch_size` is out of range.

    Example:

    ```python
    >>> from p2d_peft import P2DDataSelector

    >>> selector = P2DDataSelector(model, tokenizer, heads=heads, target=target, ratio=0.1)
    >>> selected = selector.select(pool)  # a datasets.Dataset: the pool's columns and order, plus "p2d_score"
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase,
        heads: HeadSet | None = None,
        target: Dataset | None = None,
        scorer: ScorerName = "affinity",
        ratio: float | None = None,
        num_samples: int | None = None,
        args: SFTConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        batch_size: int = 8,
        seed: int = 42,
    ) -> None:
        if scorer not in _SCORERS:
            raise ValueError(f"`scorer` must be one of {', '.join(map(repr, _SCORERS))}, got {scorer!r}.")
        if ratio is not None and num_samples is not None:
            raise ValueError(f"Give `ratio` or `num_samples`, not both; got {ratio} and {num_samples}.")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"`ratio` must be in (0, 1], got {ratio}.")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self._scorer = _SCORERS[scorer]
        if self._scorer.needs_heads:
            if heads is None:
                raise ValueError(
                    f"`scorer`={scorer!r} needs `heads`; find them with `localize_heads(...).top(0.1)`, or use "
                    "'perplexity' or 'random'."
                )
            ModelGeometry.of(model).check(heads)
        if self._scorer.needs_target and target is None:
            raise ValueError(f"`scorer`={scorer!r} needs `target`, a few samples of the task as a `datasets.Dataset`.")
        self.model = model
        self.processing_class = processing_class
        self.heads = heads
        self.target = target
        self.scorer = scorer
        self.ratio = 0.1 if ratio is None and num_samples is None else ratio
        self.num_samples = num_samples
        # bf16=False: the default asks for hardware support, and no training happens here
        self.args = SFTConfig(bf16=False, report_to="none") if args is None else args
        self.formatting_func = formatting_func
        self.batch_size = batch_size
        self.seed = seed

    def score(self, pool: Dataset) -> torch.Tensor:
        """
        Score every row of a pool.

        Args:
            pool (`Dataset`): The rows.

        Returns:
            `torch.Tensor`: shape (rows,), float64; the higher, the sooner a row is taken. NaN for a row without a token
            that counts: it is empty, or cut off by `max_length` before its completion.

        Raises:
            `ValueError`: if no row has a token that counts, or a row's score is not finite; the rows are named.
        """
        samples = self._prepare(pool, "pool")
        target = self._prepare(self.target, "target") if self._scorer.needs_target and self.target else None
        if len(samples) < samples.n_rows:
            missing = sorted(set(range(samples.n_rows)) - set(samples.rows))
            logger.warning(
                "%d of %d rows of the pool have no token that counts and will not be selected: rows %s.",
                len(missing),
                samples.n_rows,
                _shortened(missing),
            )
        with preserved_state(self.model), torch.no_grad():
            self.model.eval()
            values = self._scorer.score(
                ScoringContext(
                    model=self.model,
                    pool=samples,
                    target=target,
                    heads=self.heads,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    device=model_device(self.model),
                )
            ).double()
        bad = [samples.rows[i] for i in (~values.isfinite()).nonzero().flatten().tolist()]
        if bad:
            raise ValueError(
                f"`scorer`={self.scorer!r} gave no finite score to {len(bad)} of {samples.n_rows} rows of the pool: "
                f"rows {_shortened(bad)}. The model's outputs are not finite on them."
            )
        if len(values) > 1 and bool((values == values[0]).all()):
            logger.warning(
                "`scorer`=%r gave all %d rows the same score, so it selects by row number.", self.scorer, len(values)
            )
        scores = torch.full((samples.n_rows,), torch.nan, dtype=torch.float64)
        scores[samples.rows] = values
        return scores

    def select(self, pool: Dataset) -> Dataset:
        """
        Keep the rows with the highest scores; ties go to the lower row number.

        Args:
            pool (`Dataset`): The rows.

        Returns:
            `Dataset`: the kept rows in the pool's own columns and order, plus the column `p2d_score` (float64).

        Raises:
            `ValueError`: if `num_samples` is larger than the pool, or as [`~P2DDataSelector.score`] does.
        """
        self._count(len(pool))  # before the expensive part
        scores = self.score(pool)
        rows = self.choose(scores)
        return kept_rows(pool, rows, scores[rows].tolist())

    def choose(self, scores: torch.Tensor) -> list[int]:
        """
        The rows that [`~P2DDataSelector.select`] keeps for given scores, ascending.

        Args:
            scores (`torch.Tensor`): Shape (rows,), as [`~P2DDataSelector.score`] returns them; NaN is never kept.
        """
        count = self._count(len(scores))
        ranked = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)
        rows = sorted(row for row in ranked[:count].tolist() if not scores[row].isnan())
        if len(rows) < count:
            logger.warning("Only %d rows have a token that counts; %d were asked for.", len(rows), count)
        return rows

    def _count(self, n_rows: int) -> int:
        if self.num_samples is None:
            assert self.ratio is not None
            return max(1, round(self.ratio * n_rows))
        if self.num_samples > n_rows:
            raise ValueError(f"`num_samples`={self.num_samples} is more than the {n_rows} rows of the pool.")
        return self.num_samples

    def _prepare(self, dataset: Dataset, name: str) -> Samples:
        samples = prepare_samples(dataset, self.processing_class, self.args, self.formatting_func, name)
        if not len(samples):
            raise ValueError(
                f"No row of `{name}` has a token that counts (a label other than -100); check its contents, "
                f"`max_length`={self.args.max_length} and the loss masks."
            )
        return samples


def kept_rows(pool: Dataset, rows: list[int], scores: list[float]) -> Dataset:
    """Rows of a pool with their scores in the column `p2d_score`, which replaces that of an earlier selection."""
    kept = pool.select(rows)
    if SCORE_COLUMN in kept.column_names:
        kept = kept.remove_columns(SCORE_COLUMN)
    return kept.add_column(SCORE_COLUMN, scores)


def _shortened(rows: list[int], most: int = 10) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")
