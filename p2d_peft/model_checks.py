"""What can be wrong with a model, or with the tokens that it is to read, found before it is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


# Weights of 8 bits and less are quantized or close to it: they mean something with their scales only, and `aminmax` and
# additions do not know them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_module(model: Any) -> None:
    """
    Check that a model is one.

    Raises:
        `TypeError`: if it is, say, the name of one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a model (`torch.nn.Module`), got {type(model).__name__}. Load it with "
            "`AutoModelForCausalLM.from_pretrained`."
        )


def check_runnable(model: nn.Module) -> None:
    """
    Check that a model has its weights and that they are numbers. It costs about as much as reading the weights once.

    Raises:
        `ValueError`: if a weight is on the meta device, and Accelerate does not bring it from elsewhere, or holds NaN or an
            infinity; the message names the first one.
    """
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not is_offloaded:
            raise ValueError(
                f"`model` has no values in '{name}': it is on the meta device. Load the weights with `from_pretrained`, or "
                "give them values with `model.to_empty(...)` and `load_state_dict`."
            )
        # what is no plain tensor is sharded or quantized
        if type(parameter.data) is not torch.Tensor or parameter.dtype not in FLOATS:
            continue
        if parameter.is_meta or not parameter.numel():
            continue
        # NaN goes through both
        if not all(torch.isfinite(bound) for bound in parameter.detach().aminmax()):
            raise ValueError(
                f"`model` holds NaN or an infinity in '{name}'; whatever it says is none. Load it again, from a checkpoint "
                "before its training went wrong, or in a dtype with a wider range."
            )


def embedded_tokens(model: nn.Module) -> int | None:
    """For how many tokens a model has embeddings; None where it does not say."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_input_embeddings() if get_input_embeddings is not None else None
    # an attribute, as the weight of a sharded one is empty
    return getattr(embeddings, "num_embeddings", None)


def check_vocabulary(name: str, lowest: int, highest: int, model: nn.Module, row: int | None = None) -> None:
    """
    Check that a model has embeddings for tokens. One that it lacks ends in an `IndexError` on a CPU, and on a GPU in an
    error after which the process cannot use the GPU any more.

    Args:
        name (`str`): The argument that the tokens are from.
        lowest, highest (`int`): The extremes of their ids.
        model (`nn.Module`): The model.
        row (`int`, *optional*): The row that they are of, for the message.

    Raises:
        `ValueError`: if an id is negative or too high.
    """
    n_tokens = embedded_tokens(model)
    if n_tokens is None or 0 <= lowest <= highest < n_tokens:
        return
    where = "" if row is None else f" in row {row}"
    raise ValueError(
        f"`{name}` holds the token id {lowest if lowest < 0 else highest}{where}, but `model` has embeddings for the ids 0 "
        f"to {n_tokens - 1}: model and tokenizer do not belong together. Use the model's own tokenizer, or make room for added "
        "tokens with `model.resize_token_embeddings(len(tokenizer))`."
    )
