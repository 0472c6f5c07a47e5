"""Tiny models of the supported architectures, built from their configs, and a tokenizer made on the spot."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast


VOCAB_SIZE = 96
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name -> (config class, changes to the common sizes)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),  # GQA
    "llama-mha-bias": ("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),  # biases on q, k, v
    "qwen3": ("Qwen3Config", {"head_dim": 16}),  # q/k norm, head_dim != hidden_size / heads
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", {}),
    "cohere2": ("Cohere2Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {"hidden_size": 64}),  # rotates a quarter of each head
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),
}
# one of each kind, for the tests that need not run on all
FEW = ("llama", "llama-mha-bias", "llama-mqa", "qwen3", "gemma3")


def tiny_model(
    name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A tiny causal language model in eval mode; `changes` go to its config."""
    config_name, own = ARCHITECTURES[name]
    config_class: Callable = getattr(transformers, config_name)
    config = config_class(**{**_COMMON, **own, **changes})
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Fresh models have zero biases and unit norms, which would hide mistakes in them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_batch(rows: int = 2, tokens: int = 11, seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of shape (rows, tokens); the last row ends in `padding` padded tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    if padding:
        input_ids[-1, -padding:] = 0
        attention_mask[-1, -padding:] = 0
        labels[-1, -padding:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with `VOCAB_SIZE` entries at most, special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!+-=\n'/()")
    tokenizer.train_from_iterator(
        alphabet, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
