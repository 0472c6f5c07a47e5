"""Tiny models of the supported architectures, built from their configs, and a tokenizer made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version
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
    return _without_zeros(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))


def _without_zeros(model: PreTrainedModel) -> PreTrainedModel:
    # Fresh models have zero biases and unit norms, which would hide mistakes in them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@dataclass(frozen=True)
class Layout:
    """
    A tiny model of some attention layout, and what there is to know about its heads without asking the geometry.

    Args:
        config: Name of the config class.
        changes: What goes to the config.
        projections: For one layer of each stack, by its address, the name of the output projection.
        groups: Key/value heads a layer.
        n_heads: Query heads a layer.
        auto: Name of the auto class.
        inputs: "text", "image", "speech" or "text to text".
    """

    config: str
    changes: dict
    projections: dict[int | str, str]
    groups: int = 4
    n_heads: int = 4
    auto: str = "AutoModelForCausalLM"
    inputs: str = "text"

    def model(self, seed: int = 0) -> PreTrainedModel:
        if not hasattr(transformers, self.config):
            import pytest  # not at the top: scripts/soak.py runs without it

            pytest.skip(f"transformers {transformers.__version__} has no {self.config}")
        transformers.set_seed(seed)
        config = getattr(transformers, self.config)(**self.changes)
        return _without_zeros(getattr(transformers, self.auto).from_config(config, dtype=torch.float32))

    def batch(self) -> dict[str, torch.Tensor]:
        text = random_batch()
        generator = torch.Generator().manual_seed(0)
        if self.inputs == "image":
            return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        if self.inputs == "speech":
            return {
                "input_features": torch.randn(2, 8, 24, generator=generator),
                "decoder_input_ids": text["input_ids"],
            }
        if self.inputs == "text to text":
            # of another length than the source, so that cross-attention cannot be taken for self-attention
            return {"input_ids": text["input_ids"], "decoder_input_ids": random_batch(tokens=7, seed=1)["input_ids"]}
        return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}


_GPT2_SIZES = {"vocab_size": VOCAB_SIZE, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64}
_FALCON = {**_COMMON, "num_hidden_layers": 2, "alibi": False, "num_kv_heads": 2}
# a layer of linear attention, then one whose queries have an output gate
_GATED_HYBRID = {
    **_COMMON,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_DEEPSEEK = {
    **_COMMON,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_BART_PROJECTIONS: dict[int | str, str] = {
    "encoder.1": "model.encoder.layers.1.self_attn.out_proj",
    "decoder.1": "model.decoder.layers.1.self_attn.out_proj",
    "cross.1": "model.decoder.layers.1.encoder_attn.out_proj",
}
_VIT = (
    "vit.layers.1.attention.o_proj"
    if Version(transformers.__version__) >= Version("5.9")
    else "vit.encoder.layer.1.attention.output.dense"
)
_LLAMA: dict[int | str, str] = {1: "model.layers.1.self_attn.o_proj"}

LAYOUTS: dict[str, Layout] = {
    # those hold their heads as Llama does
    **{
        name: Layout(config, _COMMON | changes, _LLAMA, groups=(_COMMON | changes)["num_key_value_heads"])
        for name, (config, changes) in ARCHITECTURES.items()
    },
    "opt": Layout(
        "OPTConfig",
        {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 48},
        {1: "model.decoder.layers.1.self_attn.out_proj"},
    ),
    "phi": Layout("PhiConfig", _COMMON, {1: "model.layers.1.self_attn.dense"}, groups=2),
    "qwen3-moe": Layout(
        "Qwen3MoeConfig",
        {**_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        _LLAMA,
        groups=2,
    ),
    "gpt-oss": Layout(
        "GptOssConfig",
        {**_COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        _LLAMA,
        groups=2,
    ),
    "phi3": Layout("Phi3Config", _COMMON, _LLAMA, groups=2),
    "mpt": Layout(
        "MptConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        {1: "transformer.blocks.1.attn.out_proj"},
    ),
    "gpt-bigcode-mqa": Layout("GPTBigCodeConfig", _GPT2_SIZES, {1: "transformer.h.1.attn.c_proj"}, groups=1),
    "gpt-bigcode-mha": Layout(
        "GPTBigCodeConfig", {**_GPT2_SIZES, "multi_query": False}, {1: "transformer.h.1.attn.c_proj"}
    ),
    "gpt-neox": Layout("GPTNeoXConfig", _BERT, {1: "gpt_neox.layers.1.attention.dense"}),
    "bloom": Layout(
        "BloomConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 4},
        {1: "transformer.h.1.self_attention.dense"},
    ),
    "falcon-mqa": Layout(
        "FalconConfig",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
        {1: "transformer.h.1.self_attention.dense"},
        groups=1,
    ),
    "falcon-mha": Layout(
        "FalconConfig",
        {**_FALCON, "multi_query": False, "new_decoder_architecture": False, "num_kv_heads": 4},
        {1: "transformer.h.1.self_attention.dense"},
    ),
    "falcon-gqa": Layout(
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True},
        {1: "transformer.h.1.self_attention.dense"},
        groups=2,
    ),
    "codegen": Layout(
        "CodeGenConfig",
        {**_GPT2_SIZES, "n_head": 8, "rotary_dim": 4},
        {1: "transformer.h.1.attn.out_proj"},
        groups=8,
        n_heads=8,
    ),
    "gpt2": Layout("GPT2Config", _GPT2_SIZES, {1: "transformer.h.1.attn.c_proj"}),
    "qwen3-next": Layout(
        "Qwen3NextConfig",
        {**_GATED_HYBRID, **_EXPERTS},
        _LLAMA,
        groups=2,
    ),
    "qwen3.5": Layout(
        "Qwen3_5TextConfig",
        {
            **_GATED_HYBRID,
        },
        _LLAMA,
        groups=2,
    ),
    "deepseek-v3": Layout("DeepseekV3Config", _DEEPSEEK, _LLAMA),
    "deepseek-v3-no-q-latent": Layout("DeepseekV3Config", {**_DEEPSEEK, "q_lora_rank": None}, _LLAMA),
    "jamba": Layout(
        "JambaConfig",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        {3: "model.layers.3.self_attn.o_proj"},
        groups=2,
    ),
    "bamba": Layout(
        "BambaConfig",
        {
            **_COMMON,
            "attn_layer_indices": [1],
            "mamba_n_heads": 12,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
        _LLAMA,
        groups=2,
    ),
    "bert": Layout("BertConfig", _BERT, {1: "encoder.layer.1.attention.output.dense"}, auto="AutoModel"),
    "roberta": Layout(
        "RobertaConfig",
        {**_BERT, "pad_token_id": 0},
        {1: "roberta.encoder.layer.1.attention.output.dense"},
        auto="AutoModelForSequenceClassification",
    ),
    "deberta": Layout("DebertaConfig", _DEBERTA, {1: "encoder.layer.1.attention.output.dense"}, auto="AutoModel"),
    "deberta-v2": Layout("DebertaV2Config", _DEBERTA, {1: "encoder.layer.1.attention.output.dense"}, auto="AutoModel"),
    "modernbert": Layout(
        "ModernBertConfig",
        {**_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        {1: "layers.1.attn.Wo"},
        auto="AutoModel",
    ),
    "vit": Layout(
        "ViTConfig",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        {1: _VIT},
        auto="AutoModelForImageClassification",
        inputs="image",
    ),
    "t5": Layout(
        "T5Config",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 40,
            "d_kv": 12,
            "d_ff": 64,
            "num_heads": 4,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        },
        {
            "encoder.1": "encoder.block.1.layer.0.SelfAttention.o",
            "decoder.1": "decoder.block.1.layer.0.SelfAttention.o",
            "cross.1": "decoder.block.1.layer.1.EncDecAttention.o",
        },
        auto="AutoModelForSeq2SeqLM",
        inputs="text to text",
    ),
    "bart": Layout(
        "BartConfig",
        {**_BART, "max_position_embeddings": 64, "forced_eos_token_id": None},
        _BART_PROJECTIONS,
        auto="AutoModelForSeq2SeqLM",
        inputs="text to text",
    ),
    "whisper": Layout(
        "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
        _BART_PROJECTIONS,
        auto="AutoModelForSpeechSeq2Seq",
        inputs="speech",
    ),
}

# Layouts of the models above in other classes: only tests/heads/test_layouts.py tries them.
SIBLINGS: dict[str, Layout] = {
    "qwen3.5-moe": Layout("Qwen3_5MoeTextConfig", {**_GATED_HYBRID, **_EXPERTS}, _LLAMA, groups=2),
    "olmo-hybrid": Layout("OlmoHybridConfig", _GATED_HYBRID, _LLAMA, groups=2),
    "kimi-linear": Layout(
        "KimiLinearConfig",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "dense"],
            "linear_head_dim": 8,
            "linear_num_heads": 2,
        },
        _LLAMA,
    ),
}


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
