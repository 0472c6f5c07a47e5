"""What scores depend on, in short strings: if one of them changes, scores are not taken from an earlier run."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import Any

import torch
import transformers
from accelerate.utils import align_module_device
from datasets.fingerprint import Hasher
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig
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
    A checksum of all weights and buffers by name, of their exact values; and of the settings of the model and of its
    adapters, where it has such.

    The sums are made where the tensors are, at the speed of their memory.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    # beside those, what a quantized layer needs to make sense of its weights; tied weights have other names there
    known = {tensor.data_ptr() for tensor in named.values()}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and name not in named and value.data_ptr() not in known:
            named[name] = value
    sums: list[Any] = [type(model).__name__, *_settings(model)]
    for name, tensor in sorted(named.items()):
        with _at_hand(model, name, tensor) as values:
            sums.append((name, str(tensor.dtype), tuple(tensor.shape), _checksum(values)))
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _checksum(tensor: torch.Tensor) -> int:
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    # whole words where possible, weighted by their place: a permutation of the weights is another model
    words = values.view(torch.int32) if len(values) % 4 == 0 and values.storage_offset() % 4 == 0 else values
    # words that a CPU keeps in its cache, and enough of them to keep a GPU busy
    chunk = 1 << (16 if words.device.type == "cpu" else 22)
    weights = torch.arange(1, min(chunk, len(words)) + 1, device=words.device)
    total = 0
    for start in range(0, len(words), chunk):
        part = words[start : start + chunk]
        # in int64 no product overflows, so that no change of a single weight is lost
        total = (total * 1_000_003 + int((part * weights[: len(part)]).sum())) % 2**63
    return total


@contextmanager
def _at_hand(model: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Context in which a tensor of a model has its values, also where Accelerate keeps them elsewhere between passes."""
    if not tensor.is_meta:
        yield tensor
        return
    *owners, own_name = name.split(".")
    module = model
    with ExitStack() as stack:
        stack.enter_context(align_module_device(module))
        for owner in owners:  # the hook of any of them may be the one that brings it
            module = module.get_submodule(owner)
            stack.enter_context(align_module_device(module))
        yield getattr(module, own_name)


def generation_fingerprint(model: nn.Module) -> str:
    """How a model generates, as far as it says so."""
    config = getattr(model, "generation_config", None)
    return _stated(config.to_dict()) if config is not None else ""


def _settings(model: nn.Module) -> list[str]:
    """What a model does with its weights, as far as it says so."""
    config = getattr(model, "config", None)
    parts = [config.to_dict()] if isinstance(config, PretrainedConfig) else []
    return [_stated(part) for part in (*parts, *_adapters(model))]


def _stated(settings: dict[str, Any]) -> str:
    """Settings as text, without where they came from."""
    origins = ("_name_or_path", "architectures", "transformers_version", "base_model_name_or_path", "inference_mode")
    return json.dumps({str(key): value for key, value in settings.items() if key not in origins}, default=_text)


def _adapters(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What the adapters in a model do: they may be switched, scaled and disabled layer by layer, and without PEFT's model."""
    if isinstance(model, PeftModel):  # of prompt learning no layer tells
        yield {"active": model.active_adapters, "enabled": model.has_active_enabled_adapter}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield {
                "layer": name,
                "active": list(module.active_adapters),
                "disabled": module.disable_adapters,
                # not those of the module within, to which a wrapper hands on what it lacks
                "merged": vars(module).get("merged_adapters"),
                "scaling": vars(module).get("scaling"),
            }
        for adapter, config in getattr(module, "peft_config", {}).items():
            yield {"module": name, "adapter": adapter, **vars(config)}


def _text(value: Any) -> str:
    return str(_in_order(value))


def _in_order(value: Any) -> Any:
    # the order of a set differs from process to process
    return sorted(map(repr, value)) if isinstance(value, set | frozenset) else value


class NotHashable(ValueError):  # noqa: N818 (it says of what)
    """Scores depend on something of which it cannot be said whether it has changed."""


def hash_of(name: str, value: Any) -> str:
    """
    A hash of an argument with all that it holds.

    Raises:
        [`NotHashable`]: if it holds what cannot be pickled, such as an open file or a lock.
    """
    try:
        return str(Hasher.hash(value))
    except (pickle.PickleError, TypeError, AttributeError, NotImplementedError) as error:
        raise NotHashable(f"`{name}` cannot be hashed ({error}).") from error


def code_of(function: Any) -> str:
    """
    A checksum of a function's code, without what it refers to: another function of the same name has another one. Of what is
    written in no Python there is none.
    """
    # what is around it may be another partial, or a decorator such as `contextmanager`
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    code = getattr(function, "__code__", None)
    return hashlib.sha256(_code_text(code).encode()).hexdigest()[:16] if code is not None else ""


def _code_text(code: CodeType) -> str:
    # functions within it are among its constants; where they were written does not count
    constants = [_code_text(value) if isinstance(value, CodeType) else _in_order(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants))


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
        "tokenizer": hash_of("processing_class", tokenizer),
        "arguments": str({name: getattr(args, name) for name in _ARGUMENTS}),
        "autocast": str(autocast),
        # which round in their own ways
        "device": kind,
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", None)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch_size": str(batch_size),
        "seed": str(seed),
        "sample": _samples_fingerprint(sample),
        "target": _samples_fingerprint(target),
    }


def _samples_fingerprint(samples: Samples | None) -> str:
    if samples is None:
        return ""
    # by the bytes of the numbers: to hash the lists as objects takes a thousand times as long
    digest = hashlib.sha256(repr((samples.n_rows, samples.n_truncated, samples.pad_token_id)).encode())
    for numbers in (samples.rows, *samples.input_ids, *samples.labels):
        digest.update(len(numbers).to_bytes(8, "little") + array("q", numbers).tobytes())
    return digest.hexdigest()[:16]
