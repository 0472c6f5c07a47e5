"""What scores depend on, in short strings: if one of them changes, scores are not taken from an earlier run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from datasets.fingerprint import Hasher
from torch import nn
from trl import SFTConfig

from ..model_state import model_device
from ..version import __version__
from .samples import Samples


# of SFTConfig, what decides how rows become tokens
_ARGUMENTS = (
    "dataset_text_field",
    "dataset_kwargs",
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "eos_token",
)


def model_fingerprint(model: nn.Module) -> str:
    """
    A checksum of all weights and buffers by name, of their exact values; and of the adapters in use.

    The sums are made where the tensors are, at the speed of their memory.
    """
    sums: list[Any] = [type(model).__name__, str(getattr(model, "active_adapters", None))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().contiguous().flatten().view(torch.uint8)
        # whole words where possible, weighted by their place: a permutation of the weights is another model
        words = values.view(torch.int32) if len(values) % 4 == 0 and values.storage_offset() % 4 == 0 else values
        total = 0
        for start in range(0, len(words), _CHUNK):
            part = words[start : start + _CHUNK].to(torch.int64)
            weights = torch.arange(1, len(part) + 1, device=part.device)
            total = (total * 1_000_003 + int((part * weights).sum())) % 2**63
        sums.append((name, str(tensor.dtype), tuple(tensor.shape), total))
    return str(Hasher.hash(sums))


_CHUNK = 1 << 22


def run_fingerprint(
    model: nn.Module,
    tokenizer: Any,
    args: SFTConfig,
    scorer: str,
    heads: Any,
    batch_size: int,
    seed: int,
    sample: Samples | None,
    target: Samples | None,
) -> dict[str, str]:
    """What the scores of a run depend on beside the rows, by name."""
    kind = model_device(model).type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return {
        "p2d_peft": __version__,
        "scorer": scorer,
        "heads": str(heads),
        "model": model_fingerprint(model),
        "tokenizer": str(Hasher.hash(tokenizer)),
        "arguments": str({name: getattr(args, name) for name in _ARGUMENTS}),
        "autocast": str(autocast),
        "batch_size": str(batch_size),
        "seed": str(seed),
        "sample": _samples_fingerprint(sample),
        "target": _samples_fingerprint(target),
    }


def _samples_fingerprint(samples: Samples | None) -> str:
    return "" if samples is None else str(Hasher.hash(dataclasses.asdict(samples)))
