"""Checks of single arguments, with errors that name the argument, what was given and what may be."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

from .printable import shown


def is_index(value: object) -> bool:
    """Whether a value is an integer of any library that may number something."""
    # numpy and torch integers answer to __index__ too; a bool is an int in Python but not an index
    return hasattr(value, "__index__") and not isinstance(value, bool)


def check_type(name: str, value: Any, types: tuple[type, ...], wanted: str) -> None:
    """
    Check an optional argument.

    Raises:
        `TypeError`: if it is of another type.
    """
    if value is not None and not isinstance(value, types):
        raise TypeError(f"`{name}` must be {wanted}, got {type(value).__name__}.")


def check_number(name: str, value: Any, wanted: str) -> None:
    """
    Check that an argument is a number, so that it can be compared.

    Raises:
        `TypeError`: if it is none; the message says that it must be `wanted`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {wanted}, got {shown(value)}.")


def check_share(name: str, value: Any) -> None:
    """
    Check a share of something.

    Raises:
        `TypeError`: if it is no number.
        `ValueError`: if it is not in (0, 1].
    """
    check_number(name, value, "a number in (0, 1]")
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], got {value}.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """
    Check a number of things.

    Raises:
        `TypeError`: if it is no integer.
        `ValueError`: if it is below `least`.
    """
    if not is_index(value):
        raise TypeError(f"`{name}` must be an integer of at least {least}, got {shown(value)}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_choice(name: str, value: Any, choices: Iterable[str], more: str = "") -> None:
    """
    Check one of several names.

    Args:
        more (`str`, *optional*): What else the argument may be, for the message.

    Raises:
        `ValueError`: if it is none of them.
    """
    choices = list(choices)
    if value not in choices:  # a list, as the value may have no hash
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}{more}, got {shown(value)}.")
