"""What a checkpoint keeps of localizing and selecting, so that a resumed run does neither again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..efficiency import Reference, StageCosts
from ..files import read_json, write_json
from ..heads import HeadSet
from ..json_fields import checked_fields
from .data_checks import row_digests


STATE_NAME = "p2d_state.json"
_FORMAT = "p2d_peft.P2DState"


@dataclass
class P2DState:
    """
    The choices of a run.

    Args:
        heads (`HeadSet`, *optional*): The heads that are trained; with another adapter, those that scored. None if none
            were needed.
        localize_method (`str`, *optional*): How they were found; None if they were given.
        scorer (`str`, *optional*): How the rows were scored; None if all are trained on.
        rows (`list[int]`, *optional*): The selected rows of the pool, ascending; None for all.
        scores (`list[float]`, *optional*): Their scores.
        pool_rows (`int`, *optional*): Rows of the pool; None for a stream that was not read.
        pool_tokens (`int`, *optional*): Tokens of the pool.
        selected_tokens (`int`, *optional*): Tokens of the selected rows.
        reference (`Reference`, *optional*): The reference, if there is one.
        scoring_heads (`HeadSet`, *optional*): The heads that scored the rows; None if the scorer needs none.
        rows_digest (`str`, *optional*): What the tokens of the rows that are trained on come to, in their order; None where
            nobody has read them (a stream), and in checkpoints of earlier versions.
        arguments (`dict[str, Any]`, *optional*): The arguments that heads and rows were chosen by; None in checkpoints of
            earlier versions.
    """

    heads: HeadSet | None
    localize_method: str | None
    scorer: str | None = None
    rows: list[int] | None = None
    scores: list[float] | None = None
    pool_rows: int | None = None
    pool_tokens: int | None = None
    selected_tokens: int | None = None
    reference: Reference | None = None
    scoring_heads: HeadSet | None = None
    rows_digest: str | None = None
    arguments: dict[str, Any] | None = None

    def save(self, folder: str | Path, costs: StageCosts) -> None:
        """Write the state and the costs of the stages so far into a checkpoint's folder."""
        data = {
            "format": _FORMAT,
            **vars(self),
            "heads": self.heads and self.heads.to_dict(),
            "scoring_heads": self.scoring_heads and self.scoring_heads.to_dict(),
            "reference": self.reference and asdict(self.reference),
            **{f"stage_{name}": values for name, values in vars(costs).items()},
        }
        write_json(Path(folder) / STATE_NAME, data)

    @classmethod
    def load(cls, folder: str | Path) -> tuple[P2DState, StageCosts]:
        """
        Read what [`P2DState.save`] wrote.

        Raises:
            `ValueError`: if the folder holds no such state, or a damaged one.
        """
        path = Path(folder) / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint`='{folder}' has no {STATE_NAME}: P2DTrainer did not write this checkpoint. "
                "Resume with the trainer that did, or start anew."
            )
        data: Any = read_json(path)
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f"'{path}' is not the state of a P2D run.")
        try:
            return cls._of_json(data), _costs_of_json(data)
        except ValueError as error:
            raise ValueError(
                f"'{path}' is the state of a P2D run, but damaged: {error} Resume from another checkpoint, or start anew."
            ) from error

    @classmethod
    def _of_json(cls, data: Mapping[str, Any]) -> P2DState:
        data = {
            "scoring_heads": None,
            "rows_digest": None,
            "arguments": None,
            **data,
        }  # not told by checkpoints of earlier versions
        reference = data.get("reference")
        sets = {name: data.get(name) for name in ("heads", "scoring_heads")}
        parts = {
            **{name: heads and HeadSet.from_dict(heads) for name, heads in sets.items()},
            "reference": Reference(**checked_fields(Reference, reference))
            if isinstance(reference, Mapping)
            else reference,
        }
        # what has a default here is written all the same; without it the run would go on with other rows
        if missing := sorted({entry.name for entry in fields(cls)} - set(data)):
            raise ValueError(f"{', '.join(map(repr, missing))} is missing.")
        state = cls(**checked_fields(cls, {**data, **parts}))
        ascending = [-1, *(state.rows or ()), math.inf if state.pool_rows is None else state.pool_rows]
        if any(a >= b for a, b in pairwise(ascending)):
            raise ValueError(f"'rows' must be ascending numbers of the pool's {state.pool_rows} rows.")
        return state


def check_same_choices(here: P2DState, there: P2DState, checkpoint: str | Path) -> None:
    """
    Check that a trainer which has made its choices goes on from a checkpoint of them.

    Raises:
        `ValueError`: if the checkpoint is of a run on other heads or rows.
    """
    digests = (here.rows_digest, there.rows_digest)
    for name, same in (
        ("heads", here.heads == there.heads),
        ("rows", here.rows == there.rows and (None in digests or len({*digests}) == 1)),
    ):
        if not same:
            raise ValueError(
                f"`resume_from_checkpoint`='{checkpoint}' is of a run on other {name} than this trainer has chosen. Resume "
                "from it with a new trainer, or name a checkpoint of this one."
            )


def digest_of_rows(rows: Any) -> str | None:
    """
    What the tokens of all rows come to, in their order; None where they are not there to be read.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows, as a training takes them.
    """
    of_rows = b"".join(row_digests(rows))
    return hashlib.blake2b(of_rows, digest_size=16).hexdigest() if of_rows else None


def _costs_of_json(data: Mapping[str, Any]) -> StageCosts:
    # checkpoints of earlier versions have the seconds alone
    names = [entry.name for entry in fields(StageCosts)]
    return StageCosts(**checked_fields(StageCosts, {name: data.get(f"stage_{name}", {}) for name in names}))
