"""The `bm25` scorer: does a sample share rare tokens with the target?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


@contextmanager
def bm25(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    BM25 relevance (Robertson & Zaragoza, 2009; the baseline of arXiv 2402.04333), with the pool as the corpus, the
    target's samples as the queries and token ids as the words. The model is not run.

    Long queries have larger scores than short ones, so those of each query are divided by the largest that a row of the
    pool has. A row's score is the mean over the queries. Rows are counted against the whole pool, which is scored at once
    and on one process.

    Yields:
        `ScoreRows`: scores in [0, 1], float32; `per_target` holds those of the queries one by one.

    Raises:
        `ImportError`: if bm25s is not installed.
    """
    try:
        from bm25s import BM25
    except ImportError as error:
        raise ImportError("`scorer`='bm25' needs bm25s: `pip install 'p2d_peft[bm25]'`.") from error
    assert context.target is not None
    queries = [_words(ids) for ids in context.target.input_ids]

    def score(samples: Samples) -> RowScores:
        # Lucene's variant, in which a word that all rows have still counts a little, and k1 and b as Lucene has them
        index = BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
        index.index([_words(ids) for ids in samples.input_ids], show_progress=False)
        found = torch.from_numpy(np.stack([index.get_scores(query) for query in queries], axis=1)).float()
        # a query that shares no word with any row has the score 0 everywhere
        per_target = found / found.amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
        return RowScores(per_target.mean(dim=1), per_target)

    yield score


def _words(ids: list[int]) -> list[str]:
    return list(map(str, ids))


SCORER = Scorer("bm25", bm25, needs_heads=False, needs_target=True, per_target=True, passes=0, whole_pool=True)
