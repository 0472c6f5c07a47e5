"""
The layouts of attention: what the projections are called and in which order they hold the heads.

A layout is data, an [`AttentionLayout`]. Two tables say which layout an attention module has: by the name of its class,
for what cannot be told from the names of the projections, and by those names for the rest.
[`register_attention_layout`] adds to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from ..argument_checks import check_type
from .attention_geometry import Role


# the name of an attribute of the attention module, the size itself, or how to work it out from the module
Size: TypeAlias = str | int | Callable[[nn.Module], int]


@dataclass(frozen=True)
class HeadSizes:
    """
    The numbers of one attention module.

    Args:
        n_heads (`int`): H, query heads.
        n_kv_heads (`int`): G, key/value heads.
        q, k, v (`int`): Rows of the projections that one query head, one key head and one value head own.
    """

    n_heads: int
    n_kv_heads: int
    q: int
    k: int
    v: int


@dataclass(frozen=True)
class AttentionLayout:
    """
    How an attention module holds its heads.

    The number of query heads and of key/value heads follow from the sizes here and the widths of the projections.

    Args:
        q, k, v, o (`str`):
            The projections: names within the attention module. A fused projection is named by each role that it holds.
            A leading `../` leads to the module around: `"../output.dense"`.
        head_dim (`str`, `int` or `Callable[[nn.Module], int]`, *optional*, defaults to `"head_dim"`):
            The size of a head's value and of its output: the name of an attribute of the attention module, the size
            itself, or a function of the attention module.
        q_dim, k_dim (`str`, `int` or `Callable[[nn.Module], int]`, *optional*):
            Rows of a query head and of a key head, where those differ from `head_dim`.
        order (`str` or `Callable`, *optional*, defaults to `"blocks"`):
            How the rows of a fused projection are ordered. It says nothing where each role has its own projection.

            - `"blocks"`: all queries, then all keys, then all values;
            - `"groups"`: for each key/value head in turn the queries that read it, its key, its value;
            - a function from [`HeadSizes`] to the first row of each head of the roles q, k and v, for any other order.
        layer (`str`, *optional*, defaults to `"layer_idx"`):
            Attribute of the attention module with the layer's number. Where the module has none, the number is the first
            one in the module's full name, or 0.
    """

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    head_dim: Size = "head_dim"
    q_dim: Size | None = None
    k_dim: Size | None = None
    order: Literal["blocks", "groups"] | Callable[[HeadSizes], Mapping[Role, Sequence[int]]] = "blocks"
    layer: str = "layer_idx"

    def module(self, role: Role) -> str:
        """The projection of a role."""
        name: str = getattr(self, role)
        return name


def _query_and_gate(module: nn.Module) -> int:
    """Each head's queries are followed by its output gate, of the same size."""
    return 2 * int(module.head_dim)  # type: ignore[arg-type]


def _codegen_order(sizes: HeadSizes) -> dict[Role, list[int]]:
    """Four blocks, from the four TPU cores that CodeGen was trained on, each with its share of q, then v, then k."""
    per_block = sizes.n_heads // 4

    def starts(part: int) -> list[int]:
        return [
            ((head // per_block * 3 + part) * per_block + head % per_block) * sizes.q for head in range(sizes.n_heads)
        ]

    return {"q": starts(0), "v": starts(1), "k": starts(2)}


_FUSED_GROUPS = AttentionLayout("query_key_value", "query_key_value", "query_key_value", "dense", order="groups")
_GATED = AttentionLayout(q_dim=_query_and_gate)
_BERT_OUTPUT = "../output.dense"
_GPT2 = AttentionLayout("c_attn", "c_attn", "c_attn", "c_proj")
_MLA_SIZES: dict[str, str] = {"head_dim": "v_head_dim", "q_dim": "qk_head_dim", "k_dim": "qk_nope_head_dim"}

# The first layout of which the module has all projections. Names and not classes: the modelling files stay unimported.
_BY_CLASS: dict[str, tuple[AttentionLayout, ...]] = {
    "BloomAttention": (_FUSED_GROUPS,),
    "CodeGenAttention": (AttentionLayout("qkv_proj", "qkv_proj", "qkv_proj", "out_proj", order=_codegen_order),),
    # DeBERTa, versions 2 and 1; the projections of the relative positions belong to no head
    "DisentangledSelfAttention": (
        AttentionLayout("query_proj", "key_proj", "value_proj", _BERT_OUTPUT, head_dim="attention_head_size"),
        AttentionLayout("in_proj", "in_proj", "in_proj", _BERT_OUTPUT, head_dim="attention_head_size", order="groups"),
    ),
    "FalconAttention": (_FUSED_GROUPS,),  # all three variants: MHA, MQA (one group), GQA
    "GPT2Attention": (AttentionLayout("q_attn", "c_attn", "c_attn", "c_proj"), _GPT2),  # cross-attention, else self
    "GPTBigCodeAttention": (AttentionLayout("c_attn", "c_attn", "c_attn", "c_proj", order="groups"),),
    "GPTNeoXAttention": (
        AttentionLayout(
            "query_key_value", "query_key_value", "query_key_value", "dense", head_dim="head_size", order="groups"
        ),
    ),
    "ModernBertAttention": (AttentionLayout("Wqkv", "Wqkv", "Wqkv", "Wo"),),
    "MptAttention": (AttentionLayout("Wqkv", "Wqkv", "Wqkv", "out_proj"),),
    "Phi3Attention": (AttentionLayout("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),),
    "Qwen3NextAttention": (_GATED,),
    "Qwen3_5Attention": (_GATED,),
    "Qwen3_5MoeAttention": (_GATED,),
}
_BY_PROJECTIONS: tuple[AttentionLayout, ...] = (
    AttentionLayout(),  # Llama and its kin
    AttentionLayout(o="out_proj"),  # OPT, BART, Whisper
    AttentionLayout(o="dense"),  # Phi
    AttentionLayout("q", "k", "v", "o", head_dim="key_value_proj_dim"),  # T5
    AttentionLayout("query", "key", "value", _BERT_OUTPUT, head_dim="attention_head_size"),  # BERT
    # DeepSeek's latent attention, with and without a latent of the queries. What is projected down to the latents and
    # the rotated part of the keys is shared by all heads.
    AttentionLayout("q_b_proj", "kv_b_proj", "kv_b_proj", order="groups", **_MLA_SIZES),
    AttentionLayout("q_proj", "kv_b_proj", "kv_b_proj", order="groups", **_MLA_SIZES),
)

# Classes with the projections of a layout, but whose heads are not slices of them, and how that is.
_NO_SLICES: dict[str, str] = {
    "DiffLlamaAttention": (
        "subtracts the attention of one half of its heads from the other half's, so that what it hands on is of two "
        "heads each, and not of the slices of one"
    ),
}


def register_attention_layout(attention_class: type[nn.Module] | str, *layouts: AttentionLayout) -> None:
    """
    Say how an attention class holds its heads, so that all of p2d_peft works with models that use it.

    It holds for this process. Subclasses inherit it. A class that is known already gets the new layouts.

    Args:
        attention_class (`type[nn.Module]` or `str`):
            The class of the module that contains the projections, or its name.
        *layouts (`AttentionLayout`):
            The layout. Of several, that one holds for a module of which it has all projections, the earlier ones first.

    Raises:
        `TypeError`: if a layout is none.
        `ValueError`: if no layout is given.

    Example:

    ```python
    >>> from p2d_peft.heads import AttentionLayout, register_attention_layout

    >>> register_attention_layout("MyAttention", AttentionLayout(q="wq", k="wk", v="wv", o="wo", head_dim=64))
    ```
    """
    if not layouts:
        raise ValueError("`layouts` is empty; give at least one `AttentionLayout`.")
    for layout in layouts:
        check_type("layouts", layout, (AttentionLayout,), "`AttentionLayout`s")
    name = attention_class if isinstance(attention_class, str) else attention_class.__name__
    _BY_CLASS[name] = layouts


def why_no_slices(module: nn.Module) -> str | None:
    """
    How the heads of a module's class are no slices of its projections, as a predicate; `None` where they may be.

    Args:
        module (`nn.Module`): Any module.
    """
    bases = [base.__name__ for base in type(module).__mro__]
    # who registers a layout for such a class has the last word
    return next((_NO_SLICES[base] for base in bases if base in _NO_SLICES and base not in _BY_CLASS), None)


def layouts_of(module: nn.Module) -> tuple[tuple[AttentionLayout, ...], bool]:
    """
    The layouts that come into question for a module, and whether its class is known to be attention.

    Args:
        module (`nn.Module`): Any module.
    """
    # base classes, too: FSDP2 puts a class of its own in front of a module's
    for base in type(module).__mro__:
        if base.__name__ in _BY_CLASS:
            return _BY_CLASS[base.__name__], True
    return _BY_PROJECTIONS, False
