"""What measuring needs to know of the accelerator and of the other processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def are_several_processes() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def of_all_processes(value: Any) -> list[Any]:
    """A value from each process, in all of them; they all have to call this."""
    return list(gather_object([value])) if are_several_processes() else [value]


def settle(everyone: bool = True) -> None:
    """Wait until the accelerator has done what it was told to and, if wanted, all processes have come this far."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    if everyone and are_several_processes():
        PartialState().wait_for_everyone()
