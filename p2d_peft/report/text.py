"""A report, and a comparison with another one, as text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from ..printable import printable
from .overlap import Overlap
from .run_report import P2DReport


# a space that no line is broken at: "14:" and its value stay together
_UNBROKEN = "\N{NO-BREAK SPACE}"


def report_text(report: P2DReport, width: int = 100) -> str:
    """
    A report as a table of two columns, one line (or, where it is long, several) for each field.

    Args:
        report (`P2DReport`): The report.
        width (`int`, *optional*, defaults to 100): Longest line, in characters.

    Returns:
        `str`: the table, with "-" for what is not known.
    """
    fields = {field.name.replace("_", " "): getattr(report, field.name) for field in dataclasses.fields(report)}
    indent = max(map(len, fields)) + 2
    lines = (
        textwrap.fill(_shown(value), width, initial_indent=f"{name:{indent}}", subsequent_indent=" " * indent)
        for name, value in fields.items()
    )
    return "\n".join(lines).replace(_UNBROKEN, " ")


def overlap_text(overlap: Overlap) -> str:
    """The heads of two runs beside one another, in a few lines."""
    lines = [f"heads in common  {overlap.both}, of {overlap.ours} here and {overlap.theirs} in the other run"]
    if overlap.chance is not None:
        lines.append(f"by chance        {overlap.chance:.3g} on average")
    if overlap.spearman is not None:
        lines.append(f"of all scores    rank correlation {overlap.spearman:.2f}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A JSON value in a form to read."""
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(str(name))}:{_UNBROKEN}{_shown(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    return printable(str(value))  # a report may come from anywhere
