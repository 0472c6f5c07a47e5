"""
The models that TRL's tests of `SFTTrainer` load from the Hub, as stand-ins: of the same architectures, built from configs
and random, with tokenizers made from the chat templates that TRL ships. They are laid out in the form of the Hub's cache,
where the libraries look by themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available
from trl_stand_in_datasets import aphorisms


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1]}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4, "chunk_size": 8}


@dataclass(frozen=True)
class TokenizerStandIn:
    """
    A tokenizer.

    Args:
        template: Which of TRL's chat templates it has; None for none.
        eos: The token at the end.
        pad: The padding token; None for a tokenizer without.
        bos: The token at the start, which the tokenizer does not put there itself; None for none.
        ids: The numbers of tokens that must have certain ones.
    """

    template: str | None
    eos: str
    pad: str | None
    bos: str | None = None
    ids: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelStandIn:
    """
    A model and its tokenizer.

    Args:
        model: Name of the model's class.
        config: Name of the config's class.
        arguments: The config's arguments; sizes and special tokens come by themselves.
        tokenizer: Its tokenizer.
    """

    model: str
    config: str
    tokenizer: TokenizerStandIn
    arguments: dict[str, Any] = field(default_factory=dict)


_CHATML = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
# The numbers of Qwen's own tokens, which a test knows -> those here: logits over so many tokens would take minutes a test.
TOKEN_NUMBERS = {151643: 1643, 151644: 1644, 151645: 1645}
_QWEN2 = TokenizerStandIn(
    "qwen2_5",
    **_CHATML,
    ids=dict(zip(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), TOKEN_NUMBERS.values(), strict=True)),
)
_QWEN3 = TokenizerStandIn("qwen3", **_CHATML)
_GPT_OSS = TokenizerStandIn("gptoss", "<|return|>", "<|endoftext|>", "<|startoftext|>")
_DEEPSEEK_BOS, _DEEPSEEK_EOS = (f"<\uff5c{name}\u2581of\u2581sentence\uff5c>" for name in ("begin", "end"))
_LFM2 = {"model": "Lfm2ForCausalLM", "config": "Lfm2Config", "arguments": {"layer_types": ["conv", "full_attention"]}}

VISION_MODEL = "trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration"
MODELS: dict[str, ModelStandIn] = {
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ModelStandIn("Qwen2ForCausalLM", "Qwen2Config", _QWEN2),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-R1-Distill": ModelStandIn(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        TokenizerStandIn("deepseek_r1_distill", _DEEPSEEK_EOS, "<|endoftext|>", _DEEPSEEK_BOS),
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ModelStandIn(
        "Qwen3ForCausalLM", "Qwen3Config", _QWEN3, {"head_dim": 8}
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ModelStandIn(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3, {**_EXPERTS, "head_dim": 8, "num_experts": 4}
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ModelStandIn(
        "GptOssForCausalLM",
        "GptOssConfig",
        _GPT_OSS,
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "trl-internal-testing/tiny-Cohere2ForCausalLM": ModelStandIn(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        TokenizerStandIn("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<BOS_TOKEN>"),
    ),
    "trl-internal-testing/tiny-FalconMambaForCausalLM": ModelStandIn(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        TokenizerStandIn(None, "<|im_end|>", "<|pad|>"),
        {"state_size": 4},
    ),
    "trl-internal-testing/tiny-Glm4MoeForCausalLM": ModelStandIn(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        TokenizerStandIn("glm4moe", "<|user|>", "<|endoftext|>"),
        {**_EXPERTS, "n_routed_experts": 4, "num_mtp_layers": 0},
    ),
    "trl-internal-testing/tiny-DeepseekV3ForCausalLM": ModelStandIn(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        TokenizerStandIn("deepseekv3", _DEEPSEEK_EOS, _DEEPSEEK_EOS, _DEEPSEEK_BOS),
        {
            **_EXPERTS,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": ModelStandIn(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        TokenizerStandIn("nemotron_3_nano", "<|im_end|>", "<unk>"),
        {
            **_EXPERTS,
            **_MAMBA,
            "head_dim": 8,
            "initializer_range": 0.2,  # with less, the gradients of its state space are too small to train it
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 16,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        },
    ),
    "trl-internal-testing/tiny-Olmo3ForCausalLM": ModelStandIn(
        "Olmo3ForCausalLM", "Olmo3Config", TokenizerStandIn(None, **_CHATML)
    ),
    "trl-internal-testing/tiny-Lfm2ForCausalLM": ModelStandIn(
        tokenizer=TokenizerStandIn("lfm2", "<|im_end|>", "<|pad|>", "<|startoftext|>"), **_LFM2
    ),
    "trl-internal-testing/tiny-Lfm2ForCausalLM-2.5": ModelStandIn(
        tokenizer=TokenizerStandIn("lfm2_2_5", "<|im_end|>", "<|pad|>", "<|startoftext|>"), **_LFM2
    ),
    "trl-internal-testing/tiny-GPTNeoXForCausalLM": ModelStandIn(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", TokenizerStandIn(None, "<|endoftext|>", None, "<|endoftext|>")
    ),
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": ModelStandIn(
        "MistralForCausalLM", "MistralConfig", TokenizerStandIn(None, "</s>", None, "<s>")
    ),
    "trl-internal-testing/tiny-RemoteForCausalLM": ModelStandIn(
        "Qwen2ForCausalLM", "Qwen2Config", TokenizerStandIn("qwen2_5", **_CHATML)
    ),
    # only where there is torchvision, see make_models
    VISION_MODEL: ModelStandIn(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        TokenizerStandIn("qwen2_5_vl", **_CHATML),
        {
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 4,
                "out_hidden_size": 16,
            }
        },
    ),
    # whose chat template a test takes
    "Qwen/Qwen3-4B": ModelStandIn("Qwen3ForCausalLM", "Qwen3Config", _QWEN3, {"head_dim": 8}),
}
# a revision that a test asks for, and how many characters it expects of the chat template there
OTHER_REVISION = ("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", "8913f5819566", 2558)

_REMOTE_CODE = '''"""A model whose code lies beside its weights."""

from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
'''


def make_models(cache: Path) -> None:
    """
    Build all models and tokenizers into a folder that has the form of the Hub's cache.

    Args:
        cache (`Path`): The folder, to be used as `HF_HUB_CACHE`.
    """
    for name, stand_in in MODELS.items():
        if name == VISION_MODEL and not is_torchvision_available():
            continue  # its processor needs it
        folder = _snapshot(cache, name)
        tokenizer = make_tokenizer(stand_in.tokenizer)
        make_model(stand_in, tokenizer).save_pretrained(folder)
        (_processor(tokenizer) if name == VISION_MODEL else tokenizer).save_pretrained(folder)
        if name == "trl-internal-testing/tiny-RemoteForCausalLM":
            _put_code_beside(folder)
        if name == OTHER_REVISION[0]:
            _, revision, length = OTHER_REVISION
            other = _snapshot(cache, name, revision)
            shutil.copytree(folder, other, dirs_exist_ok=True)
            template = other / "chat_template.jinja"
            template.write_text(template.read_text().ljust(length))


def make_model(stand_in: ModelStandIn, tokenizer: PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    """A random model that fits the tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config_class = getattr(transformers, stand_in.config)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    sizes = {**_SIZES, "vocab_size": vocab_size, **special}
    if "vision_config" in stand_in.arguments:
        sizes = {"text_config": {**sizes, "rope_parameters": _MROPE}, **_vision_tokens(tokenizer)}
    config = config_class(**{**sizes, **stand_in.arguments})
    transformers.set_seed(0)
    model = getattr(transformers, stand_in.model)(config)
    model.generation_config = GenerationConfig(**special)
    return model


def _vision_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _processor(tokenizer: PreTrainedTokenizerFast) -> transformers.ProcessorMixin:
    """A processor that makes few tokens of an image."""
    pixels = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )


def make_tokenizer(stand_in: TokenizerStandIn) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows the words of the datasets and of the chat templates."""
    template = None if stand_in.template is None else (TEMPLATES / f"{stand_in.template}.jinja").read_text()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        # the aphorisms often, so that their words become tokens: a test counts how many of them are packed together
        [*aphorisms() * 50, *([template] if template else [])],
        trainers.BpeTrainer(
            vocab_size=800, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(merge) for merge in learned["merges"]]
    named = {token for token in (stand_in.bos, stand_in.eos, stand_in.pad) if token is not None}
    in_template = re.findall(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>", template or "")
    special = list(dict.fromkeys([*stand_in.ids, *sorted(named), *in_template]))
    for token in special:
        vocab[token] = stand_in.ids.get(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=stand_in.bos, eos_token=stand_in.eos, pad_token=stand_in.pad
    )
    fast.chat_template = template
    return fast


def _snapshot(cache: Path, name: str, revision: str = "main") -> Path:
    """The folder of a revision's files in the Hub's cache, and the reference by which it is found."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    reference = repository / "refs" / revision
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit)
    return folder


def _put_code_beside(folder: Path) -> None:
    (folder / "modeling_remote.py").write_text(_REMOTE_CODE)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_type"], config["architectures"] = "remote", ["RemoteForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2))
