"""Does a rerun end where the first run did?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localize_report import distinct

from p2d_peft.files import read_json

from .runner import ARMS


METRICS = ("nll", "exact_match")


def compare(here: Path, there: Path) -> dict[str, Any]:
    """
    Two folders of results, arm by arm, as far as both have an arm.

    Args:
        here (`Path`), there (`Path`): The folders.

    Returns:
        `dict`: how many arms both have, on how many test sets these were judged, how many of the judgements are equal to the
            last digit, and the largest difference of each metric; the CPU seconds of the common arms' stages, here and
            there; and where they ran.

    Raises:
        `ValueError`: if no arm is in both.
    """
    names = sorted(
        {path.name for path in (here / ARMS).glob("*.json")} & {path.name for path in (there / ARMS).glob("*.json")}
    )
    if not names:
        raise ValueError(f"'{here}' and '{there}' have no arm in common.")
    pairs = [(read_json(here / ARMS / name), read_json(there / ARMS / name)) for name in names]
    judged = [(a["test"][target], b["test"][target]) for a, b in pairs for target in a["test"]]
    differences = {name: [abs(a[name] - b[name]) for a, b in judged] for name in METRICS}
    return {
        "arms": len(names),
        "judgements": len(judged),
        "equal": sum(not any(of_metrics) for of_metrics in zip(*differences.values(), strict=True)),
        "largest_difference": {name: max(values) for name, values in differences.items()},
        "cpu_seconds": [sum(_cpu_seconds(pair[side]) for pair in pairs) for side in range(2)],
        "where": [distinct(_where(pair[side]) for pair in pairs) for side in range(2)],
    }


def _cpu_seconds(arm: dict[str, Any]) -> float:
    return float(sum(stage["cpu"] for stage in arm["seconds"].values()))


def _where(arm: dict[str, Any]) -> dict[str, Any]:
    return {name: arm[name] for name in ("machine", "versions", "command")}
