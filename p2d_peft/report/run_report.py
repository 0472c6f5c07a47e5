"""
`P2DReport`: the contents of `p2d_report.json`, the record of one run. This module owns its schema.

| schema | added |
|---|---|
| 2 | `stage_tokens`, `stage_peak_memory`, `peak_memory_kind`, `device`, `processes` |
| 3 | `layer_heads`, `arguments`; p2d_peft's own version in `versions` |
| 4 | `scoring_heads` |

Each later version reads the earlier ones. A field is never given another meaning: it gets a new name.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

from ..version import __version__
from .records import Record


REPORT_NAME = "p2d_report.json"


def library_versions() -> dict[str, str]:
    """The versions of this library, of Python and of the libraries that a result depends on."""
    packages = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    return {
        "p2d_peft": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


@dataclass(frozen=True)
class P2DReport(Record):
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
        layer_heads (`dict[str, int]`, *optional*): How many heads each of its layers has; layers without heads are left
            out.
        heads (`dict[str, list[int]]`, *optional*): The heads that were trained by layer; with another adapter, those that
            scored the rows.
        localize_method (`str`, *optional*): How they were found; None if they were given.
        pool_rows (`int`, *optional*): Rows of the pool.
        pool_tokens (`int`, *optional*): Tokens of the pool.
        selected_rows (`int`, *optional*): Rows that were kept.
        selected_tokens (`int`, *optional*): Their tokens.
        scorer (`str`, *optional*): The scorer that kept them; None if all rows were trained on.
        scoring_heads (`dict[str, list[int]]`, *optional*): The heads that it scored by, by layer; None if it needs none.
        trainable_parameters (`int`): Weights that were trained.
        total_parameters (`int`): All weights of the model, those of the adapter included.
        arguments (`dict[str, bool | int | float | str | None]`): The training arguments that are not the defaults, as far
            as they are plain values and no paths; where results go and who may read them is left out.
        versions (`dict[str, str]`): Of p2d_peft, of Python and of the libraries.
    """

    format: ClassVar[str] = "p2d_peft.P2DReport"
    title: ClassVar[str] = "a P2D report"
    schema: ClassVar[int] = 4
    since: ClassVar[dict[int, dict[str, Any]]] = {
        2: {
            "stage_tokens": {},
            "stage_peak_memory": {},
            "peak_memory_kind": None,
            "device": None,
            "processes": None,
        },
        3: {"layer_heads": None, "arguments": {}},
        4: {"scoring_heads": None},
    }

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
    layer_heads: dict[str, int] | None
    heads: dict[str, list[int]] | None
    localize_method: str | None
    pool_rows: int | None
    pool_tokens: int | None
    selected_rows: int | None
    selected_tokens: int | None
    scorer: str | None
    scoring_heads: dict[str, list[int]] | None
    trainable_parameters: int
    total_parameters: int
    arguments: dict[str, bool | int | float | str | None]
    versions: dict[str, str] = field(default_factory=library_versions)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from .page import report_fragment

        return report_fragment(self)
