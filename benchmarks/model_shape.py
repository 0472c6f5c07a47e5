"""Models to measure time and memory with, which do not depend on what the weights are."""

from __future__ import annotations

from typing import Any

import torch
from environment import device
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192}
# the sizes in the configurations of these models
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.2-3b": {
        **_LLAMA_3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}


def load_model(model: str | None, shape: str | None, dtype: torch.dtype) -> nn.Module:
    """
    A causal language model on the accelerator, or on the CPU without one.

    Args:
        model (`str`, *optional*): Its folder or Hub id.
        shape (`str`, *optional*): Without `model`: one of `SHAPES`, to be filled with random weights.
        dtype (`torch.dtype`): Of its weights.
    """
    if model is not None:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device())
        return loaded
    assert shape is not None
    with device():  # there it is quicker by far
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPES[shape]), dtype=dtype)
