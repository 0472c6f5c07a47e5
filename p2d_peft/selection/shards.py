"""The pool in shards, and their scores on disk, so that a run that was killed can go on where it was."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from pyarrow import feather

from ..files import replacing, write_json
from .pool import dataset_of, in_memory


logger = logging.getLogger(__name__)

# Rows of a shard: many enough to find rows of like length for a batch, few enough to lose little by a crash. Scores of
# scorers that put samples together depend on it.
SHARD_ROWS = 1024


@dataclass(frozen=True)
class Shard:
    """
    Neighbouring rows of a pool.

    Args:
        index (`int`): The shard's number.
        first_row (`int`): The row of the pool that it starts with.
        rows (`Dataset`): The rows, in memory.
    """

    index: int
    first_row: int
    rows: Dataset


def shards_of(pool: Dataset | IterableDataset, size: int | None = SHARD_ROWS) -> Iterator[Shard]:
    """
    The shards of a pool, one after the other; no two of them are in memory together, unless the caller keeps them.

    Args:
        pool (`Dataset` or `IterableDataset`): The pool.
        size (`int` or `None`): Rows of a shard; `None` takes the whole pool as one.
    """
    if isinstance(pool, Dataset):
        size = size or max(len(pool), 1)
        for index, start in enumerate(range(0, len(pool), size)):
            yield Shard(index, start, in_memory(pool.select(range(start, min(start + size, len(pool))))))
        return
    rows = iter(pool.with_format(None))
    index = start = 0
    while part := list(islice(rows, size)):
        yield Shard(index, start, dataset_of(part, pool))
        index, start = index + 1, start + len(part)


@dataclass(frozen=True)
class ScoredShard:
    """
    The scores of one shard.

    Args:
        index, first_row (`int`): As in [`Shard`].
        scores (`torch.Tensor`): Shape (rows of the shard,), float64; NaN for rows without a token that counts.
        n_tokens (`torch.Tensor`): Shape (rows of the shard,), int32; the length of each row, 0 where it has no score.
        n_truncated (`int`): Number of rows that were cut off.
        per_target (`torch.Tensor`, *optional*): Shape (rows of the shard, target's samples), float32.
        seconds (`float`): What scoring it took. The first shard that a process scores is charged with what the scorer
            does before, as reading the target.
        passed_tokens (`int`): Tokens that passed through the model meanwhile, padding left out.
    """

    index: int
    first_row: int
    scores: torch.Tensor
    n_tokens: torch.Tensor
    n_truncated: int
    per_target: torch.Tensor | None = None
    seconds: float = 0.0
    passed_tokens: int = 0


class ShardStore:
    """
    Scored shards in a folder of their own, one Arrow file each, which is there in full or not at all.

    Args:
        folder (`Path`): The folder of all runs.
        fingerprint (`dict[str, str]`): All that the scores depend on beside the rows of the shard. A run with another
            one has another folder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, str]) -> None:
        self.folder = folder / Hasher.hash(fingerprint)
        if not (self.folder / "run.json").exists():
            write_json(self.folder / "run.json", fingerprint)

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:06}.arrow"

    def load(self, shard: Shard) -> ScoredShard | None:
        """The scores of a shard, if they are there and belong to the very same rows."""
        try:
            table = feather.read_table(self._path(shard.index), memory_map=False)
            metadata = table.schema.metadata or {}
            per_target = None
            if "per_target" in table.column_names:
                values = torch.tensor(table["per_target"].combine_chunks().flatten().to_numpy())
                per_target = values.view(len(shard.rows), -1)
            scored = ScoredShard(
                shard.index,
                shard.first_row,
                torch.tensor(table["score"].to_numpy()),
                torch.tensor(table["n_tokens"].to_numpy()),
                int(metadata[b"n_truncated"]),
                per_target,
                float(metadata[b"seconds"]),
                int(metadata[b"passed_tokens"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RuntimeError):
            # whatever is wrong with it, its rows can be scored again
            logger.warning("'%s' is damaged; its rows are scored again.", self._path(shard.index))
            return None
        if metadata.get(b"content") != _content(shard).encode():
            return None
        if metadata.get(b"checksum") != _checksum(scored).encode():
            logger.warning("'%s' is damaged; its rows are scored again.", self._path(shard.index))
            return None
        return scored

    def save(self, shard: Shard, scored: ScoredShard) -> None:
        """Write the scores of a shard."""
        columns = {"score": pa.array(scored.scores.numpy()), "n_tokens": pa.array(scored.n_tokens.numpy())}
        if scored.per_target is not None:
            values = pa.array(scored.per_target.flatten().numpy())
            columns["per_target"] = pa.FixedSizeListArray.from_arrays(values, scored.per_target.shape[1])
        metadata = {
            "content": _content(shard),
            **{name: str(number) for name, number in _numbers(scored).items()},
            "checksum": _checksum(scored),
        }
        with replacing(self._path(shard.index)) as temporary:
            feather.write_feather(pa.table(columns, metadata=metadata), temporary, compression="zstd")


def _content(shard: Shard) -> str:
    """A hash of the rows themselves: streams have no fingerprint, and files may change under a name."""
    # of their representation, as a pickle also tells which of two equal objects are one; and of what Arrow holds, as that
    # of a decoded image is its address
    values = shard.rows.with_format("arrow")[:].to_pydict()
    return hashlib.sha256(repr((shard.first_row, values)).encode()).hexdigest()


def _numbers(scored: ScoredShard) -> dict[str, float]:
    return {name: getattr(scored, name) for name in ("n_truncated", "seconds", "passed_tokens")}


def _checksum(scored: ScoredShard) -> str:
    """A hash of all that is kept of a shard: Arrow does not notice a flipped bit."""
    found = hashlib.sha256(repr(_numbers(scored)).encode())
    for tensor in (scored.scores, scored.n_tokens, scored.per_target):
        if tensor is not None:
            found.update(repr((tensor.dtype, tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
