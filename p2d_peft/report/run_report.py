"""`P2DReport`: the contents of `p2d_report.json`, the record of one run."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import read_json, write_json


REPORT_NAME = "p2d_report.json"
_FORMAT = "p2d_peft.P2DReport"
_SCHEMA = 1


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@dataclass(frozen=True)
class P2DReport:
    """
    One run: what was chosen, what it cost, and what it cost in relation to the reference.

    Args:
        stage_seconds (`dict[str, float]`): Seconds of `localize`, `select` and `train`.
        epochs (`float`): Epochs trained on the selected rows.
        reference_seconds (`float`, *optional*): Seconds of full-parameter SFT on the whole pool for as many epochs;
            None if it was neither given nor estimated.
        reference_source (`str`, *optional*): `"given"` or `"estimated"`.
        reference_relative_error (`float`, *optional*): Of an estimate, its relative standard error.
        aer (`float`, *optional*): Alignment Efficiency Ratio; None without a reference.
        speedup (`float`, *optional*): 1 / AER.
        model (`str`, *optional*): Id or path of the base model.
        seed (`int`): Seed of the run.
        n_heads (`int`): Heads of the model.
        heads (`dict[str, list[int]]`, *optional*): The selected heads by layer.
        localize_method (`str`, *optional*): How they were found; None if they were given.
        pool_rows (`int`, *optional*): Rows of the pool; None for a stream of which nothing was selected.
        pool_tokens (`int`, *optional*): Tokens of the pool.
        selected_rows (`int`, *optional*): Rows that were kept.
        selected_tokens (`int`, *optional*): Their tokens.
        scorer (`str`, *optional*): The scorer that kept them; None if all rows were trained on.
        trainable_parameters (`int`): Weights that were trained.
        total_parameters (`int`): All weights of the model, those of the adapter included.
        versions (`dict[str, str]`): Of Python and of the libraries.
    """

    stage_seconds: dict[str, float]
    epochs: float
    reference_seconds: float | None
    reference_source: str | None
    reference_relative_error: float | None
    aer: float | None
    speedup: float | None
    model: str | None
    seed: int
    n_heads: int
    heads: dict[str, list[int]] | None
    localize_method: str | None
    pool_rows: int | None
    pool_tokens: int | None
    selected_rows: int | None
    selected_tokens: int | None
    scorer: str | None
    trainable_parameters: int
    total_parameters: int
    versions: dict[str, str] = field(default_factory=library_versions)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON to the file `path`."""
        write_json(path, {"format": _FORMAT, "schema": _SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> P2DReport:
        """
        Read a report that [`P2DReport.save`] wrote.

        Raises:
            `ValueError`: if the file is not a report of this version of the schema.
        """
        data: Any = read_json(path)
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT or data.get("schema") != _SCHEMA:
            raise ValueError(f"'{path}' is not a P2D report of schema {_SCHEMA}.")
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})
