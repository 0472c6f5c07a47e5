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
from ..json_fields import checked_fields
from ..printable import shown


REPORT_NAME = "p2d_report.json"
_FORMAT = "p2d_peft.P2DReport"
_SCHEMA = 2
# What reports of schema 1 lack: these were not measured then.
_SINCE_SCHEMA_2: dict[str, Any] = {
    "stage_tokens": {},
    "stage_peak_memory": {},
    "peak_memory_kind": None,
    "device": None,
    "processes": None,
}


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@dataclass(frozen=True)
class P2DReport:
    """
    One run: what was chosen, what it cost, and what it cost in relation to the reference.

    A run of [`P2DTrainer`] with `p2d=False` has the stage `train` alone, no scorer and no AER; it is a reference for
    others. Sizes that it cannot tell (of a stream, or of packed rows) are None.

    Args:
        stage_seconds (`dict[str, float]`): Seconds of `localize`, `select` and `train`.
        stage_tokens (`dict[str, int]`): Tokens that passed through the model in each stage, in all processes together,
            padding left out; a token that passes twice counts twice.
        stage_peak_memory (`dict[str, int]`): Peak of the memory in each stage in bytes, of the process where it is
            highest.
        peak_memory_kind (`str`, *optional*): What that is the memory of: `"accelerator"` or `"process"`, see
            [`~p2d_peft.memory.memory_kind`].
        device (`str`, *optional*): The kind of device that it ran on, such as `"cuda"` or `"cpu"`.
        processes (`int`, *optional*): How many processes it ran in.
        epochs (`float`): Epochs trained on the selected rows.
        reference_seconds (`float`, *optional*): Seconds of full-parameter SFT on the whole pool for as many epochs;
            None if it was neither given nor estimated.
        reference_source (`str`, *optional*): `"given"`, `"measured"` or `"estimated"`.
        reference_relative_error (`float`, *optional*): Of an estimate, its relative standard error.
        aer (`float`, *optional*): Alignment Efficiency Ratio; None without a reference.
        speedup (`float`, *optional*): 1 / AER.
        model (`str`, *optional*): Id or path of the base model.
        seed (`int`): Seed of the run.
        n_heads (`int`, *optional*): Heads of the model.
        heads (`dict[str, list[int]]`, *optional*): The selected heads by layer.
        localize_method (`str`, *optional*): How they were found; None if they were given.
        pool_rows (`int`, *optional*): Rows of the pool.
        pool_tokens (`int`, *optional*): Tokens of the pool.
        selected_rows (`int`, *optional*): Rows that were kept.
        selected_tokens (`int`, *optional*): Their tokens.
        scorer (`str`, *optional*): The scorer that kept them; None if all rows were trained on.
        trainable_parameters (`int`): Weights that were trained.
        total_parameters (`int`): All weights of the model, those of the adapter included.
        versions (`dict[str, str]`): Of Python and of the libraries.
    """

    stage_seconds: dict[str, float]
    stage_tokens: dict[str, int]
    stage_peak_memory: dict[str, int]
    peak_memory_kind: str | None
    device: str | None
    processes: int | None
    epochs: float
    reference_seconds: float | None
    reference_source: str | None
    reference_relative_error: float | None
    aer: float | None
    speedup: float | None
    model: str | None
    seed: int
    n_heads: int | None
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
        Read a report that [`P2DReport.save`] wrote. One of schema 1 lacks the tokens and the memory of its stages.

        Raises:
            `ValueError`: if the file is not a report of a schema that this version knows, or one of its entries is of a
                type that it cannot have.
        """
        data: Any = read_json(path)
        if not is_report(data):
            raise ValueError(f"'{path}' is not a P2D report.")
        if data.get("schema") not in (1, _SCHEMA):
            raise ValueError(
                f"'{path}' is a P2D report of schema {shown(data.get('schema'))}, but this version of p2d_peft reads 1 to "
                f"{_SCHEMA}; use the version that wrote it, or a newer one."
            )
        try:
            return cls(**checked_fields(cls, {**_SINCE_SCHEMA_2, **data}))
        except ValueError as error:
            raise ValueError(f"'{path}' is a P2D report that was damaged or made by hand: {error}") from error


def is_report(data: Any) -> bool:
    """Whether the contents of a JSON file are a report, of whatever schema."""
    return isinstance(data, Mapping) and data.get("format") == _FORMAT
