"""Inputs that the tables of faults share, made when they are first asked for."""

from __future__ import annotations

import math
from functools import cache

import torch
import transformers
from trl import SFTConfig

from p2d_peft import HeadScores, HeadSet, P2DDataSelector, localize_heads

from ..tiny_data import prompt_completion
from ..tiny_models import VOCAB_SIZE, random_batch, tiny_model, tiny_tokenizer


HEADS = HeadSet([(0, 1), (1, 0)])
OF_ANOTHER_MODEL = HeadSet([(0, 1), (77, 0)])

model = cache(tiny_model)
tokenizer = cache(tiny_tokenizer)
pool = cache(prompt_completion)


@cache
def small_vocabulary() -> torch.nn.Module:
    return tiny_model(vocab_size=20)


@cache
def with_nan() -> torch.nn.Module:
    broken = tiny_model()
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    return broken


@cache
def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return tiny_model()


@cache
def without_attention() -> torch.nn.Module:
    config = transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, state_size=4)
    return transformers.AutoModelForCausalLM.from_config(config)


@cache
def no_template() -> transformers.PreTrainedTokenizerBase:
    plain = tiny_tokenizer()
    plain.chat_template = None
    return plain


def scores() -> HeadScores:
    return HeadScores(torch.arange(12.0).view(3, 4), "random")


def batch(**changes: object) -> list[dict[str, torch.Tensor]]:
    return [{**random_batch(), **changes}]


def localize(given=None, batches=None, method="proxy", **kwargs):
    return localize_heads(
        model() if given is None else given, batch() if batches is None else batches, method, **kwargs
    )


def selector(given=None, processing_class=None, **changes):
    values = {"heads": HEADS, "target": prompt_completion(4, seed=1), **changes}
    return P2DDataSelector(
        model() if given is None else given, tokenizer() if processing_class is None else processing_class, **values
    )


def select(rows=None, given=None, **changes):
    return selector(given, **changes).select(pool() if rows is None else rows)


def sft_config(**changes):
    return SFTConfig(bf16=False, report_to="none", **changes)
