"""How many tokens pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def passed_tokens(model: nn.Module) -> Iterator[Callable[[], int]]:
    """
    Context that counts the tokens of all forward passes of a model, padding left out.

    A token that passes twice counts twice; one whose keys and values come from a cache does not. Passes that begin
    elsewhere than in the model's own call do not count.

    Args:
        model (`nn.Module`): The model; a hook is on it within the context.

    Yields:
        `Callable[[], int]`: gives the number so far.
    """
    # summed up on the device: a number for the CPU would make it wait for the accelerator in each pass
    totals: dict[torch.device, torch.Tensor] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((tensor for tensor in given if tensor is not None), None)
        if tokens is None:
            return
        rows, length = tokens.shape[:2]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            passing = mask[:, -length:].sum()  # what comes before is of the cache
        else:
            passing = torch.tensor(rows * length, device=tokens.device)
        totals[passing.device] = totals[passing.device] + passing if passing.device in totals else passing

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lambda: sum(int(total) for total in totals.values())
    finally:
        handle.remove()
