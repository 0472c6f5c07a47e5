"""Text from files and datasets, made fit for a terminal and for one line."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """
    A text in one line without characters that a terminal would obey: escape sequences, which can repaint what was
    printed before, and marks that reverse the direction of writing. Such characters are shown as Python writes them.
    """
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any, most: int = 80) -> str:
    """A value for an error message, cut off where it is long."""
    text = printable(repr(value))
    return text if len(text) <= most else f"{text[: most - 1]}…"
