"""
P2D: find the attention heads that matter for a task, let heads pick the data, train heads only.

Importing the package registers the `HEAD_SPARSE` method with PEFT, its one side effect; everything else is imported
when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Registers the method, so that `PeftModel.from_pretrained` knows its adapters after `import p2d_peft`.
from .tuners import HeadSparseConfig
from .version import __version__


if TYPE_CHECKING:
    from .heads import HeadScores, HeadSet, localize_heads
    from .selection import P2DDataSelector
    from .trainer import P2DConfig, P2DTrainer

_LAZY = {
    "HeadScores": ".heads",
    "HeadSet": ".heads",
    "localize_heads": ".heads",
    "P2DDataSelector": ".selection",
    "P2DConfig": ".trainer",
    "P2DTrainer": ".trainer",
}

__all__ = [
    "HeadScores",
    "HeadSet",
    "HeadSparseConfig",
    "P2DConfig",
    "P2DDataSelector",
    "P2DTrainer",
    "__version__",
    "localize_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
