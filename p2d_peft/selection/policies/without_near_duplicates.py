"""`WithoutNearDuplicates`: no row that says almost the same as a better one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ...argument_checks import check_share
from .policy import Policy, Ranking


if TYPE_CHECKING:
    from datasketch import MinHash

# Tokens of a shingle: some words, so that rows of one template are not taken for copies.
SHINGLE = 5
# The standard error of an estimated similarity is at most 1 / (2 * sqrt(N_HASHES)), 0.044.
N_HASHES = 128
# The index is asked for rows that are this much less similar, as it overlooks some at the very threshold that it is
# made for; what it finds is looked at again.
MARGIN = 0.75
# Rows that are tokenized at once.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class WithoutNearDuplicates(Policy):
    """
    Drops rows whose tokens are nearly those of a row that is ranked higher and kept. The similarity is that of Jaccard
    between the rows' sets of shingles, 5 tokens in a row, estimated by MinHash (Broder 1997). Needs `datasketch`
    (`pip install "p2d_peft[dedup]"`).

    Rows are looked at only as far as they are asked for, some thousand at a time. So put it first, or wherever it is
    cheapest: no later policy gets to see a duplicate.

    Args:
        threshold (`float`, *optional*, defaults to 0.8): The similarity, in (0, 1], from which on a row is dropped.

    Raises:
        `ValueError`: if `threshold` is out of range.
        `ImportError`: if `datasketch` is not installed.
    """

    threshold: float = 0.8

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        if importlib.util.find_spec("datasketch") is None:
            raise ImportError("`WithoutNearDuplicates` needs datasketch: pip install 'p2d_peft[dedup]'")

    def __call__(self, rows: Iterable[int], ranking: Ranking) -> Iterator[int]:
        from datasketch import MinHashLSH

        index = MinHashLSH(
            # below a tenth it would have to look at everything
            threshold=max(0.1, MARGIN * self.threshold),
            num_perm=N_HASHES,
            weights=(0.1, 0.9),  # a row too many is only looked at, one too few is a duplicate
        )
        kept: dict[int, MinHash] = {}
        rows = iter(rows)
        while chunk := list(islice(rows, min(CHUNK_ROWS, max(64, ranking.wanted)))):
            samples = ranking.samples(chunk)
            tokens = dict(zip(samples.rows, samples.input_ids, strict=True))
            for row in chunk:
                hashes = _min_hash(tokens[row], ranking.seed)
                if any(hashes.jaccard(kept[other]) >= self.threshold for other in index.query(hashes)):
                    continue
                index.insert(row, hashes)
                kept[row] = hashes
                yield row


def _min_hash(input_ids: list[int], seed: int) -> MinHash:
    from datasketch import MinHash

    ids = np.asarray(input_ids, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, min(SHINGLE, len(ids)))
    # numpy's generator, which draws the hash functions, takes seeds of 32 bits
    hashes = MinHash(N_HASHES, seed=seed % 2**32)
    hashes.update_batch({window.tobytes() for window in windows})
    return hashes
