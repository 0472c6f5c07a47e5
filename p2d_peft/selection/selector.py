"""`P2DDataSelector`: step two of the method, which rows of a pool the selected heads want."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..argument_checks import check_choice, check_count, check_share, check_type, is_index
from ..heads import HeadSet, ModelGeometry
from ..heads.samples import is_encoder_decoder
from ..model_checks import check_module
from ..printable import shown
from . import affinity, bm25, gradient, icl, ifd, influence, length, less, perplexity, random, rds
from .engine import PoolScores, ScoringEngine
from .policies import Policy, Ranking
from .policies.policy import most_fitting
from .pool import column_of, kept_rows, ranked, rows_of
from .report import ScoringEstimate, ScoringReport
from .scoring import Scorer


logger = logging.getLogger(__name__)

ScorerName = Literal[
    "affinity", "bm25", "gradient", "icl", "ifd", "influence", "length", "less", "perplexity", "random", "rds"
]
_SCORERS = {
    scorer.name: scorer
    for scorer in (
        affinity.SCORER,
        bm25.SCORER,
        gradient.SCORER,
        icl.SCORER,
        ifd.SCORER,
        influence.SCORER,
        length.SCORER,
        less.SCORER,
        perplexity.SCORER,
        random.SCORER,
        rds.SCORER,
    )
}


def needs_heads(scorer: ScorerName) -> bool:
    """Whether a scorer needs the selected heads."""
    return _SCORERS[scorer].needs_heads


def needs_target(scorer: ScorerName) -> bool:
    """Whether a scorer needs samples of the task."""
    return _SCORERS[scorer].needs_target


def scores_per_target(scorer: ScorerName) -> bool:
    """Whether a scorer compares a row with each of the target's samples."""
    return _SCORERS[scorer].per_target


def has_features(scorer: ScorerName) -> bool:
    """Whether a scorer has features of rows, by which `Diverse` tells what is alike."""
    return _SCORERS[scorer].features


def share_of_rows(ratio: float, n_rows: int) -> int:
    """How many of so many rows a ratio keeps: at least one."""
    return max(1, round(ratio * n_rows))


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
            The selected heads, as `localize_heads(...).top(0.1)` gives them. Needed by `affinity`,
            `icl`, `influence` and `gradient`; any other set of heads will do, too.
        target (`Dataset`, *optional*):
            A few samples of the task, of any type that a pool may have. Needed by `affinity`, `icl`, `gradient`,
            `less`, `rds` and `bm25`.
        scorer (`str` or [`Scorer`], *optional*, defaults to `"affinity"`):
            - `"affinity"`: pooled outputs of the selected heads against the target's; part of one forward pass;
            - `"icl"`: the paper's, attention of the selected heads to the sample as a demonstration, weighted by the
              likelihood of the target's answers;
            - `"influence"`: how much the loss grows without the selected heads; two forward passes;
            - `"gradient"`: the loss's gradients in the selected heads against the target's; a forward pass and the part
              of a backward pass down to the lowest of them;
            - `"less"`: LESS, the gradients of a LoRA adapter after a short training with it against the target's; the
              expensive rival;
            - `"rds"`: RDS+, the last hidden states against the target's; one forward pass;
            - `"ifd"`: instruction-following difficulty, how little the prompt helps with the answer; two forward passes.
              With a smaller model and its tokenizer it is Superfiltering;
            - `"bm25"`: rare tokens shared with the target; the model is not run. Needs `pip install 'p2d_peft[bm25]'`;
            - `"perplexity"`: the hardest samples; a control;
            - `"length"`: the longest answers; a control;
            - `"random"`: a seeded draw; the control.

            What each computes, and where it comes from, is in the docs (`docs/scorers.md`). A [`Scorer`] of one's own
            takes the same place, or [`icl_scorer`] with a metric for generated answers.
        ratio (`float`, *optional*):
            Share of the pool's rows to keep, in (0, 1]; rounded, at least one row. 0.1, the paper's, if none of `ratio`,
            `num_samples` and `max_tokens` is given.
        num_samples (`int`, *optional*):
            Number of rows to keep, in place of `ratio`.
        max_tokens (`int`, *optional*):
            Number of tokens to keep, in place of `ratio`: the best rows that fit into it. Rows count as they will be
            trained on, truncated to `max_length`.
        policies (`Sequence[Policy]`, *optional*):
            What else decides on the rows beside their scores, applied in this order; see `p2d_peft.selection.policies`.
        args (`SFTConfig`, *optional*):
            How rows become tokens: `max_length`, `dataset_text_field`, `completion_only_loss`, `assistant_only_loss`
            and the like. Pass the config you will train with; its other fields are not read.
        formatting_func (`Callable`, *optional*):
            As in `SFTTrainer`: from a row to its text.
        batch_size (`int`, *optional*, defaults to 8):
            Rows a forward pass.
        seed (`int`, *optional*, defaults to 42):
            The same seed gives the same rows.
        cache_dir (`str` or `Path`, *optional*):
            Folder to keep scores in as they come. A run that was killed goes on from there, if model, heads, rows,
            target and options are the same; where one of them changed, it starts anew. On several machines it has to be
            a shared one, or be left out. By default nothing is written.

    Attributes:
        report ([`ScoringReport`] or `None`): What there is to tell of the last scoring.
        scores (`torch.Tensor` or `None`): The scores that it gave.
        n_tokens (`torch.Tensor` or `None`): The length of each row as it was scored, int64; 0 where there is no score.
        rows (`list[int]` or `None`): The rows that the last `select` kept, ascending.

    Raises:
        `TypeError`: if an argument is of another type.
        `ValueError`: if the scorer is unknown or lacks what it needs, `heads` does not fit the model, the model has
            several stacks of attention or is an encoder-decoder and the scorer runs it, or `ratio`, `num_samples`,
            `max_tokens` or `batch_size` is out of range.

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
        scorer: ScorerName | Scorer = "affinity",
        ratio: float | None = None,
        num_samples: int | None = None,
        max_tokens: int | None = None,
        policies: Sequence[Policy] = (),
        args: SFTConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        batch_size: int = 8,
        seed: int = 42,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_module(model)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError(
                "`processing_class` must be a tokenizer (`PreTrainedTokenizerBase`), got "
                f"{type(processing_class).__name__}."
            )
        check_type("heads", heads, (HeadSet,), "a `HeadSet`")
        check_type("target", target, (Dataset,), "a `datasets.Dataset`")
        check_type("args", args, (SFTConfig,), "an `SFTConfig`")
        check_type("cache_dir", cache_dir, (str, os.PathLike), "a path")
        if not isinstance(policies, Sequence) or not all(isinstance(policy, Policy) for policy in policies):
            raise TypeError(f"`policies` must be a list of policies, got {shown(policies)}.")
        if not isinstance(scorer, Scorer):
            check_choice("scorer", scorer, _SCORERS, more=", or a `Scorer`")
            scorer = _SCORERS[scorer]
        sizes = {"ratio": ratio, "num_samples": num_samples, "max_tokens": max_tokens}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"Give only one of `ratio`, `num_samples` and `max_tokens`, got {given}.")
        if ratio is not None:
            check_share("ratio", ratio)
        for name, value in (("num_samples", num_samples), ("max_tokens", max_tokens)):
            if value is not None:
                check_count(name, value)
        check_count("batch_size", batch_size)
        if not is_index(seed):
            raise TypeError(f"`seed` must be an integer, got {shown(seed)}.")
        if scorer.needs_heads:
            if heads is None:
                raise ValueError(
                    f"`scorer`={scorer.name!r} needs `heads`; find them with `localize_heads(...).top(0.1)`, or use "
                    "'perplexity' or 'random'."
                )
            geometry = ModelGeometry.of(model)
            if geometry.stacks:
                raise ValueError(
                    f"`scorer`={scorer.name!r} is for models with one stack of attention, but `model` "
                    f"({type(model).__name__}) has several ({', '.join(geometry.stacks)}); use 'random'."
                )
            geometry.check(heads)
        # also for a scorer without heads: both parts would get the same row, and the answer would only be copied
        if scorer.passes and is_encoder_decoder(model):
            raise ValueError(
                f"`scorer`={scorer.name!r} asks how a model goes on with a row, but `model` ({type(model).__name__}) is "
                "an encoder-decoder, which reads it beforehand; use 'bm25', 'length' or 'random'."
            )
        if scorer.needs_target and target is None:
            raise ValueError(
                f"`scorer`={scorer.name!r} needs `target`, a few samples of the task as a `datasets.Dataset`."
            )
        for needed, what in (
            ("per_target", "scores for each of the target's samples"),
            ("features", "features of rows"),
        ):
            if not getattr(scorer, needed) and any(getattr(policy, f"needs_{needed}") for policy in policies):
                able = [name for name, known in _SCORERS.items() if getattr(known, needed)]
                raise ValueError(
                    f"`policies` need {what}, which `scorer`={scorer.name!r} does not give; use one of {able}."
                )
        self.ratio = 0.1 if not given else ratio
        self.num_samples = num_samples
        self.max_tokens = max_tokens
        self.policies = tuple(policies)
        self.report: ScoringReport | None = None
        self.scores: torch.Tensor | None = None
        self.n_tokens: torch.Tensor | None = None
        self.rows: list[int] | None = None
        self.engine = ScoringEngine(
            scorer=scorer,
            model=model,
            processing_class=processing_class,
            # bf16=False: the default asks for hardware support, and no training happens here
            args=SFTConfig(bf16=False, report_to="none") if args is None else args,
            formatting_func=formatting_func,
            heads=heads,
            target=target,
            batch_size=batch_size,
            seed=int(seed),
            cache_dir=None if cache_dir is None else Path(cache_dir),
            per_target=any(policy.needs_per_target for policy in self.policies),
            with_features=any(policy.needs_features for policy in self.policies),
        )

    def score(self, pool: Dataset | IterableDataset) -> torch.Tensor:
        """
        Score every row of a pool. What there is to tell of it is in `report` afterwards.

        Started by `accelerate launch` or `torchrun`, each process scores its share of the pool, and all get all scores.

        Args:
            pool (`Dataset` or `IterableDataset`): The rows. Of a stream no more than some thousand are in memory at once.

        Returns:
            `torch.Tensor`: shape (rows,), float64; the higher, the sooner a row is taken. NaN for a row without a token
            that counts: it is empty, or cut off by `max_length` before its completion.

        Raises:
            `ValueError`: if no row has a token that counts, or a row's score is not finite; the rows are named.
        """
        return self._score(pool).scores

    def select(self, pool: Dataset | IterableDataset) -> Dataset:
        """
        Keep the rows with the highest scores; ties go to the lower row number.

        Args:
            pool (`Dataset` or `IterableDataset`): The rows. A stream is read twice: once to score its rows and once to
                pick those that are kept, so it has to give the same rows again.

        Returns:
            `Dataset`: the kept rows in the pool's own columns and order, plus the column `p2d_score` (float64).

        Raises:
            `ValueError`: if `num_samples` is larger than the pool, if `policies` or `max_tokens` leave no row, or as
                [`~P2DDataSelector.score`] does.
        """
        # before the expensive part
        if isinstance(pool, Dataset) and self.num_samples is not None:
            self._count(len(pool))
        if isinstance(pool, Dataset | IterableDataset):
            for policy in self.policies:
                policy.check(pool)
        scored = self._score(pool)
        self.rows = rows = self._choose(pool, scored)
        return kept_rows(rows_of(pool, rows), scored.scores[rows].tolist())

    def choose(self, scores: torch.Tensor) -> list[int]:
        """
        The rows with the highest of given scores, ascending: what [`~P2DDataSelector.select`] keeps where there are no
        `policies` and no `max_tokens`.

        Args:
            scores (`torch.Tensor`): Shape (rows,), as [`~P2DDataSelector.score`] returns them; NaN is never kept.

        Raises:
            `ValueError`: if there is a `max_tokens`, since scores do not tell how long a row is.
        """
        if self.max_tokens is not None:
            raise ValueError("`choose` knows no lengths, which `max_tokens` is about; use `select`.")
        count = self._count(len(scores))
        rows = sorted(ranked(scores)[:count])
        if len(rows) < count:
            logger.warning("Only %d rows have a token that counts; %d were asked for.", len(rows), count)
        return rows

    def estimate(self, pool: Dataset) -> ScoringEstimate:
        """
        Forecast what scoring a pool will take, from a few batches of it.

        Args:
            pool (`Dataset`): The rows.
        """
        return self.engine.estimate(pool)

    def _score(self, pool: Dataset | IterableDataset) -> PoolScores:
        scored = self.engine.score(pool)
        self.report, self.scores, self.n_tokens = scored.report, scored.scores, scored.n_tokens
        return scored

    def _choose(self, pool: Dataset | IterableDataset, scored: PoolScores) -> list[int]:
        """The rows to keep, ascending, after all policies."""
        if not self.policies and self.max_tokens is None:
            return self.choose(scored.scores)
        n_tokens = scored.n_tokens.tolist()
        rows: Iterable[int] = ranked(scored.scores)
        if self.max_tokens is None:
            wanted = self._count(len(scored.scores))
        else:
            wanted = most_fitting(scored.n_tokens[scored.n_tokens > 0], self.max_tokens)
            # what fits in no case would take a turn, a share, or the place of a shorter copy
            rows = [row for row in rows if n_tokens[row] <= self.max_tokens]
        ranking = Ranking(
            scores=scored.scores,
            n_tokens=scored.n_tokens,
            wanted=wanted,
            seed=self.engine.seed,
            column=lambda name: column_of(pool, name),
            samples=lambda chosen: self.engine.prepare(rows_of(pool, sorted(chosen)), "pool", sorted(chosen)),
            features=lambda chosen: self.engine.features(pool, list(chosen)),
            per_target=scored.per_target,
            max_tokens=self.max_tokens,
        )
        for policy in self.policies:
            rows = policy(rows, ranking)
        if self.max_tokens is None:
            kept = list(islice(rows, wanted))
            if len(kept) < wanted:
                logger.warning("The policies left %d rows; %d were asked for.", len(kept), wanted)
        else:
            kept = _fitting(rows, n_tokens, self.max_tokens)
        if not kept:
            if self.max_tokens is None:
                raise ValueError(f"No row is left after {len(self.policies)} `policies`; loosen them.")
            shortest = int(scored.n_tokens[scored.n_tokens > 0].min())
            raise ValueError(
                f"No row is left within `max_tokens`={self.max_tokens} after {len(self.policies)} `policies`: the shortest "
                f"row has {shortest} tokens. Raise `max_tokens`, or loosen the policies."
            )
        return sorted(kept)

    def _count(self, n_rows: int) -> int:
        if self.num_samples is None:
            assert self.ratio is not None
            return share_of_rows(self.ratio, n_rows)
        if self.num_samples > n_rows:
            raise ValueError(f"`num_samples`={self.num_samples} is more than the {n_rows} rows of the pool.")
        return self.num_samples


def _fitting(rows: Iterable[int], n_tokens: list[int], max_tokens: int) -> list[int]:
    """The first rows that fit into a budget of tokens together; one that is too long leaves its place to the next."""
    shortest = min(length for length in n_tokens if length)
    kept, left = [], max_tokens
    for row in rows:
        if n_tokens[row] <= left:
            kept.append(row)
            left -= n_tokens[row]
        if left < shortest:
            break
    return kept
