"""Tokens that a cloned chat template brings along, which an adapter has to learn."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoProcessor, PreTrainedModel
from trl.trainer.utils import get_config_model_id

from ..tuners import HeadSparseConfig
from .config import P2DConfig


def vocabulary(processing_class: Any) -> dict[str, int]:
    """The vocabulary of a tokenizer, or of a processor's tokenizer."""
    found: dict[str, int] = getattr(processing_class, "tokenizer", processing_class).get_vocab()
    return found


def brings_tokens(args: P2DConfig) -> bool:
    """Whether `chat_template_path` names a tokenizer, of which `SFTTrainer` takes the added tokens, too."""
    path = args.chat_template_path
    return path is not None and not (os.path.isfile(path) and path.endswith((".jinja", ".j2")))


def load_processing_class(model: Any, args: P2DConfig) -> Any:
    """What `SFTTrainer` loads where it is given none."""
    kwargs = args.model_init_kwargs or {}
    return AutoProcessor.from_pretrained(
        model if isinstance(model, str) else get_config_model_id(model.config),
        revision=kwargs.get("revision") if isinstance(model, str) else None,
        trust_remote_code=args.trust_remote_code,
    )


def learn_tokens(config: HeadSparseConfig, token_ids: list[int], model: PreTrainedModel) -> None:
    """
    Let an adapter train the embeddings of added tokens and the head that predicts them, as `SFTTrainer` does it.

    Args:
        config ([`HeadSparseConfig`]): Changed in place.
        token_ids (`list[int]`): The added tokens.
        model (`PreTrainedModel`): The model, which says what its embeddings are called.
    """
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    embeddings, head = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    indices = config.trainable_token_indices or {}
    if isinstance(indices, list):  # PEFT's short form
        indices = {embeddings: indices}
    config.trainable_token_indices = {**indices, embeddings: [*indices.get(embeddings, []), *token_ids]}
    if head not in (config.modules_to_save or ()):
        config.modules_to_save = [*(config.modules_to_save or ()), head]
