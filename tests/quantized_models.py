"""Tiny Llamas whose weights bitsandbytes quantized."""

import torch
import transformers

from .tiny_models import tiny_model


# blocks of 64 weights: the hidden size is a multiple of that
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SCHEMES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


def save_base(folder):
    """Save the model that `load_quantized` quantizes."""
    tiny_model(**SIZES).save_pretrained(folder)
    return folder


def load_quantized(folder, scheme):
    config = transformers.BitsAndBytesConfig(**SCHEMES[scheme])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
