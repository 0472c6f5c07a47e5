"""Scores a pool shard by shard, on one process or several, and remembers what is done."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..heads import HeadSet
from ..model_checks import check_runnable, check_vocabulary
from ..model_state import model_device, preserved_state, uncompiled
from ..passed_tokens import passed_tokens
from ..printable import shown
from .fingerprint import NotHashable, code_of, generation_fingerprint, hash_of, run_fingerprint
from .pool import rows_of
from .pool_scores import PoolScores, nothing_counts, put_together
from .progress import ScoringProgress
from .report import ScoringEstimate
from .row_checks import check_rows
from .samples import Samples, prepare_samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext
from .shards import SHARD_ROWS, ScoredShard, Shard, ShardStore, shards_of


logger = logging.getLogger(__name__)

# What a scorer gets to see of a pool as a whole. The error of a mean over so many rows is a 22nd of the rows' own spread.
SAMPLE_ROWS = 512
# Batches that a forecast scores.
ESTIMATE_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class ScoringEngine:
    """
    A scorer with all that it needs, to be let loose on pools.

    Args:
        scorer (`Scorer`): The scorer.
        model, processing_class, args, formatting_func, heads, batch_size, seed, cache_dir: As in [`P2DDataSelector`].
        target (`Dataset`, *optional*): The samples of the task.
        per_target (`bool`): Whether the scores for each of the target's samples are wanted.
        with_features (`bool`): Whether there will be a need for features, so that a scorer without them fails early.
    """

    scorer: Scorer
    model: nn.Module
    processing_class: PreTrainedTokenizerBase
    args: SFTConfig
    formatting_func: Callable[[dict[str, Any]], str] | None
    heads: HeadSet | None
    target: Dataset | None
    batch_size: int
    seed: int
    cache_dir: Path | None
    per_target: bool
    with_features: bool

    def score(self, pool: Dataset | IterableDataset) -> PoolScores:
        """Score every row of a pool; for what is raised see [`P2DDataSelector.score`]."""
        start = time.perf_counter()
        if not isinstance(pool, Dataset | IterableDataset):
            raise TypeError(
                f"`pool` must be a `datasets.Dataset` or `datasets.IterableDataset`, got {type(pool).__name__}."
            )
        if isinstance(pool, Dataset):
            check_rows(pool, self.processing_class, self.args, self.formatting_func, "pool")
        if self.scorer.passes or self.scorer.needs_heads:
            check_runnable(self.model)
        target, sample = self._target(), self._sample(pool)
        process, n_processes = _process()
        store = self._store(sample, target)
        size = None if self.scorer.whole_pool else SHARD_ROWS
        total = None
        if isinstance(pool, Dataset):
            step = size or max(len(pool), 1)
            total = sum(min(step, len(pool) - row) for row in range(process * step, len(pool), n_processes * step))
        progress = ScoringProgress(f"Select ({self.scorer.name})", total, self.scorer.passes, process == 0)
        done: list[ScoredShard] = []
        resumed: list[ScoredShard] = []
        try:
            # opened only where there is something to score
            with ExitStack() as stack:
                score_rows: ScoreRows | None = None
                passed = stack.enter_context(passed_tokens(self.model))
                for shard in shards_of(pool, size):
                    if shard.index % n_processes != process:
                        continue
                    scored = store.load(shard) if store is not None else None
                    if scored is not None:
                        resumed.append(scored)
                        progress.start_shard()
                    else:
                        began, passed_before = time.perf_counter(), passed()
                        if score_rows is None:
                            score_rows = stack.enter_context(self._open(sample, target, progress))
                        progress.start_shard()
                        scored = self._score_shard(shard, score_rows)
                        seconds = time.perf_counter() - began
                        scored = replace(scored, seconds=seconds, passed_tokens=passed() - passed_before)
                        if store is not None:
                            store.save(shard, scored)
                    progress.end_shard(len(shard.rows))
                    done.append(scored)
        except BaseException as error:
            if store is not None and done:
                logger.warning(
                    "Scoring stopped. The scores of %d rows are kept in '%s': the same run, started again, goes on from "
                    "there.",
                    sum(len(scored.scores) for scored in done),
                    self.cache_dir,
                )
            elif isinstance(error, KeyboardInterrupt):
                logger.warning(
                    "Scoring stopped. No scores are kept, and the model is as it was. With a `cache_dir` scores are kept for "
                    "every %d rows.",
                    SHARD_ROWS,
                )
            raise
        finally:
            progress.close()
        if n_processes > 1:
            done = sorted(gather_object(done), key=lambda scored: scored.index)
        of_processes = gather_object([resumed]) if n_processes > 1 else [resumed]
        return put_together(done, self.scorer.name, self.args.max_length, of_processes, time.perf_counter() - start)

    def _score_shard(self, shard: Shard, score_rows: ScoreRows) -> ScoredShard:
        """Score one shard's rows."""
        samples = self.prepare(shard.rows, "pool", shard.first_row)
        n_rows = len(shard.rows)
        scores = torch.full((n_rows,), torch.nan, dtype=torch.float64)
        n_tokens = torch.zeros(n_rows, dtype=torch.int32)
        per_target = None
        if len(samples):
            found = score_rows(samples)
            self._check_scores(found, len(samples))
            places = [row - shard.first_row for row in samples.rows]
            # what is not finite is told from what does not count by its length
            scores[places] = found.scores.double()
            n_tokens[places] = torch.tensor([len(ids) for ids in samples.input_ids], dtype=torch.int32)
            if self.with_features and found.features is None:
                raise ValueError(self._no_features())
            if self.per_target:
                if found.per_target is None:
                    raise ValueError(
                        f"`policies` need scores for each of the target's samples, which `scorer`={self.scorer.name!r} "
                        "does not give; use 'affinity'."
                    )
                per_target = torch.full((n_rows, found.per_target.shape[1]), torch.nan)
                per_target[places] = found.per_target.float()
        return ScoredShard(shard.index, shard.first_row, scores, n_tokens, samples.n_truncated, per_target)

    def _check_scores(self, found: Any, n_samples: int) -> None:
        """Check what a scorer, which may be the user's own, says of samples."""
        if not isinstance(found, RowScores) or not isinstance(found.scores, torch.Tensor):
            raise TypeError(
                f"`scorer`={self.scorer.name!r} must give `RowScores` of a tensor, got "
                f"{shown(found.scores if isinstance(found, RowScores) else found)}."
            )
        if found.scores.shape != (n_samples,):  # a single one would be taken for all
            raise ValueError(
                f"`scorer`={self.scorer.name!r} must give one score for each of the {n_samples} samples of a call, got "
                f"scores of shape {tuple(found.scores.shape)}."
            )

    def features(self, pool: Dataset | IterableDataset, rows: list[int]) -> torch.Tensor:
        """The scorer's features of some rows, in the order asked for."""
        ascending = sorted(rows)
        samples = self.prepare(rows_of(pool, ascending), "pool", ascending)
        with self._open(self._sample(pool), self._target()) as score_rows:
            features = score_rows(samples).features
        if features is None:
            raise ValueError(self._no_features())
        place = {row: index for index, row in enumerate(samples.rows)}
        return features[[place[row] for row in rows]]

    @contextmanager
    def _open(
        self, sample: Samples | None, target: Samples | None, progress: ScoringProgress | None = None
    ) -> Iterator[ScoreRows]:
        """The scorer, ready to score."""
        watched = {} if progress is None else {"progress": progress.passed}
        with preserved_state(self.model), uncompiled(), torch.no_grad():
            self.model.eval()
            context = ScoringContext(
                model=self.model,
                tokenizer=self.processing_class,
                sample=sample,
                target=target,
                heads=self.heads,
                batch_size=self.batch_size,
                seed=self.seed,
                device=model_device(self.model),
                **watched,
            )
            with self.scorer.open(context) as score_rows:
                yield score_rows

    def _target(self) -> Samples | None:
        if not self.scorer.needs_target:
            return None
        assert self.target is not None
        target = self.prepare(self.target, "target")
        if not len(target):
            raise ValueError(nothing_counts("target", self.args.max_length))
        return target

    def _sample(self, pool: Dataset | IterableDataset) -> Samples | None:
        """Some rows of the pool, for scorers that have to know it as a whole."""
        if not self.scorer.needs_sample:
            return None
        if isinstance(pool, Dataset):
            rows = sorted(self._draw(len(pool))[:SAMPLE_ROWS])
            sample = self.prepare(pool.select(rows), "pool", rows)
        else:  # what comes later would have to be read first
            first = next(shards_of(pool, SAMPLE_ROWS), None)
            if first is None:
                raise ValueError("`pool` has no rows.")
            sample = self.prepare(first.rows, "pool")
        if not len(sample):
            raise ValueError(nothing_counts("pool", self.args.max_length))
        return sample

    def _draw(self, n_rows: int) -> list[int]:
        """All rows in a random order."""
        order: list[int] = torch.randperm(n_rows, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order

    def _store(self, sample: Samples | None, target: Samples | None) -> ShardStore | None:
        if self.cache_dir is None:
            return None
        try:
            fingerprint = self._fingerprint(sample, target)
        except NotHashable as error:  # as for datasets' cache
            logger.warning("%s No scores are kept in '%s': a run that dies starts anew.", error, self.cache_dir)
            return None
        return ShardStore(self.cache_dir, fingerprint)

    def _fingerprint(self, sample: Samples | None, target: Samples | None) -> dict[str, str]:
        named = {
            "per_target": str(self.per_target),
            "scorer_code": code_of(self.scorer.open),
            "scorer_options": hash_of("scorer", self.scorer.options),
            "formatting_func": hash_of("formatting_func", self.formatting_func),
        }
        if self.scorer.generates:
            named["generation"] = generation_fingerprint(self.model)
        return named | run_fingerprint(
            self.model,
            self.processing_class,
            self.args,
            self.scorer.name,
            self.heads if self.scorer.needs_heads else None,
            self.batch_size,
            self.seed,
            sample,
            target,
        )

    def estimate(self, pool: Dataset) -> ScoringEstimate:
        """
        Forecast what scoring a pool will take, from a few batches.

        Args:
            pool (`Dataset`): The rows.

        Returns:
            [`ScoringEstimate`]
        """
        if not isinstance(pool, Dataset):
            raise TypeError(f"`pool` must be a `datasets.Dataset` to forecast, got {type(pool).__name__}.")
        if not len(pool):
            raise ValueError("`pool` has no rows.")
        start = time.perf_counter()
        target, sample = self._target(), self._sample(pool)
        drawn = self._draw(len(pool))[SAMPLE_ROWS if self.scorer.needs_sample else 0 :]
        rows = sorted(drawn[: ESTIMATE_BATCHES * self.batch_size])
        samples = None
        with self._open(sample, target) as score_rows:
            opened = time.perf_counter()
            if rows:  # the sample's are scored by now
                samples = self.prepare(pool.select(rows), "pool", rows)
                if len(samples):
                    score_rows(samples)
            end = time.perf_counter()
        share = len(drawn) / len(rows) if rows else 0
        return ScoringEstimate(
            seconds=opened - start + (end - opened) * share,
            n_rows=len(pool),
            n_tokens=round(sum(part.n_tokens / part.n_rows * len(pool) for part in (samples or sample,) if part)),
            measured_rows=len(rows),
            measured_seconds=end - start,
        )

    def prepare(self, dataset: Dataset, name: str, rows: int | list[int] = 0) -> Samples:
        samples = prepare_samples(dataset, self.processing_class, self.args, self.formatting_func, name, rows)
        if self.scorer.passes:
            for row, ids in zip(samples.rows, samples.input_ids, strict=True):
                check_vocabulary(name, min(ids), max(ids), self.model, row)
        return samples

    def _no_features(self) -> str:
        return f"`policies` need features of rows, which `scorer`={self.scorer.name!r} does not have; use 'affinity'."


def _process() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if torch.distributed.is_available() and (
        torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    ):
        state = PartialState()
        return state.process_index, state.num_processes
    return 0, 1
