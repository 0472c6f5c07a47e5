"""Finds the attention modules of a model, reads their heads off them by their layouts, and numbers the layers."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention_geometry import COLUMNS, ROLES, ROWS, AttentionGeometry, Role, Units
from .head_set import Layer, layer_order
from .layouts import AttentionLayout, HeadSizes, Size, layouts_of, why_no_slices


HOW_TO_DESCRIBE = (
    "If its heads are slices of linear layers, describe them with `p2d_peft.heads.register_attention_layout`"
)
_NOT_DESCRIBABLE = "No layout can describe that; LoRA trains such a model"
# State-space and linear-attention layers of hybrids have no softmax over positions, so what they call heads are no
# attention heads; most have other projections as well. "KimiLinearAttention" is the softmax attention of Kimi Linear.
_NOT_SOFTMAX = re.compile(r"((Delta|(?<!Kimi)Linear|Lightning)Attention|GatedDeltaNet)$")
_CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}


def find_attentions(model: nn.Module) -> dict[Layer, AttentionGeometry]:
    """
    The attention modules of a model by the address of their layer, in order; empty if there are none.

    Args:
        model (`nn.Module`): The model; adapters may be attached.

    Raises:
        `ValueError`: if a module is attention of a layout that is not known, or two have the same address. The message
            names the module, what was found there and how to describe it, if it can be.
    """
    modules = dict(model.named_modules())
    towers = _other_towers(model, modules)
    found: list[AttentionGeometry] = []
    refused: dict[str, tuple[str, str]] = {}  # what is wrong with a module, and the way out
    unknown: list[str] = []
    done = "\0"  # no name starts with it
    for name, module in modules.items():
        if name.startswith((done, *towers)) or _NOT_SOFTMAX.search(type(module).__name__):
            continue
        no_slices = why_no_slices(module)
        if no_slices is not None:
            refused[name] = (f"{_what(modules, name)} {no_slices}", _NOT_DESCRIBABLE)
            continue
        layouts, known = layouts_of(module)
        layout = next((layout for layout in layouts if _has(modules, name, layout)), None)
        if layout is not None:
            done = f"{name}." if name else ""
            try:
                found.append(_read(modules, name, layout))
            except ValueError as error:
                refused[name] = (str(error), HOW_TO_DESCRIBE)
        elif known or _looks_like_attention(module):
            unknown.append(name)
    # Some attention modules wrap others (BertAttention around BertSelfAttention). The innermost ones count.
    inner = [attention.name for attention in found] + list(refused) + unknown
    for name in unknown:
        if not any(other.startswith(f"{name}." if name else "") for other in inner if other != name):
            wrong, way_out = "is of no known layout", HOW_TO_DESCRIBE
            if _lacks_keys_or_values(modules[name]):
                # Gemma 4 and 3n: they are another layer's, or the values are the keys
                wrong, way_out = "does not project both keys and values of its own", _NOT_DESCRIBABLE
            refused[name] = (f"{_what(modules, name)} {wrong}: it has {_contents(modules[name])}", way_out)
    if refused:
        wrong, way_out = next(iter(refused.values()))
        more = f" (and {len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise ValueError(f"Unsupported attention in `model` ({type(model).__name__}): {wrong}{more}. {way_out}.")
    return _by_address(model, modules, found)


def _other_towers(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """
    What stands beside the language model in a model of several modalities, as the beginnings of its modules' names: on
    text it does not run, so its heads are no heads of ours.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate() or inner.config.is_encoder_decoder:
        return ()
    if inner.config.get_text_config(decoder=True) is inner.config:
        return ()
    names = {module: name for name, module in modules.items()}
    language_model = names.get(inner.get_decoder(), "")
    parts = language_model.split(".") if language_model else []
    # at each level on the way to the language model, all children but the next one on it
    return tuple(
        f"{prefix}{child}."
        for depth, part in enumerate(parts)
        for prefix in [".".join([*parts[:depth], ""])]
        for child, _ in modules[prefix.removesuffix(".")].named_children()
        if child != part
    )


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that adapters wrap, or the module itself where none does."""
    while True:
        # base_layer of a tuner's layer, original_module of PEFT's wrapper around what is trained in full
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module computes attention itself, as far as its children or its class name tell."""
    if {"q_proj", "k_proj", "v_proj"} <= {child for child, _ in module.named_children()}:
        return True
    has_parameters = any(True for _ in module.parameters())
    return has_parameters and re.search(r"Attention\d*$", type(module).__name__) is not None


def _lacks_keys_or_values(module: nn.Module) -> bool:
    """Whether a module has queries and an output of some layout, and nothing that could be its keys or its values."""
    projections = {
        name
        for name, child in module.named_children()
        # a child that has children may hold one of them
        if isinstance(base_layer(child), (nn.Linear, Conv1D)) or next(child.children(), None) is not None
    }
    layouts, _ = layouts_of(module)
    return any({layout.q, layout.o} <= projections < {layout.module(role) for role in ROLES} for layout in layouts)


def _full_name(attention: str, path: str) -> str:
    """The full name of a projection that a layout gives relative to an attention module."""
    while path.startswith("../"):
        attention, path = attention.rpartition(".")[0], path.removeprefix("../")
    return f"{attention}.{path}" if attention else path


def _has(modules: dict[str, nn.Module], attention: str, layout: AttentionLayout) -> bool:
    """Whether all projections of a layout are there."""
    return all(_full_name(attention, layout.module(role)) in modules for role in ROLES)


def _what(modules: dict[str, nn.Module], name: str) -> str:
    return f"'{name}' ({type(modules[name]).__name__})"


def _contents(module: nn.Module) -> str:
    """What a module consists of, for messages."""
    parts = []
    for name, child in module.named_children():
        base = base_layer(child)
        sizes = f" {_in_features(base)} -> {_out_features(base)}" if isinstance(base, (nn.Linear, Conv1D)) else ""
        parts.append(f"{name} ({type(base).__name__}{sizes})")
    parts.extend(f"{name} ({type(p).__name__})" for name, p in module.named_parameters(recurse=False))
    return ", ".join(parts) or "no children"


# read from the attributes: the shape of a quantized or sharded weight says nothing
def _in_features(linear: nn.Linear | Conv1D) -> int:
    return int(linear.nx if isinstance(linear, Conv1D) else linear.in_features)


def _out_features(linear: nn.Linear | Conv1D) -> int:
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)


def _read(modules: dict[str, nn.Module], name: str, layout: AttentionLayout) -> AttentionGeometry:
    """The geometry of one attention module, with the layer's bare number; `ValueError` where the widths do not fit."""
    module, what = modules[name], _what(modules, name)
    names = {role: _full_name(name, layout.module(role)) for role in ROLES}
    linears: dict[Role, nn.Linear | Conv1D] = {}
    for role in ROLES:
        base = base_layer(modules[names[role]])
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise ValueError(
                f"{what} has the projection '{names[role]}' of type {type(base).__name__}; supported are linear layers"
            )
        linears[role] = base

    def size(size: Size) -> int:
        value = getattr(module, size, None) if isinstance(size, str) else size(module) if callable(size) else size
        if not isinstance(value, int) or value < 1:
            got = f"the integer attribute `{size}`" if isinstance(size, str) else f"the size {size!r}"
            raise ValueError(f"{what} does not have {got} that its layout asks for; it has {_contents(module)}")
        return value

    v = size(layout.head_dim)
    q = v if layout.q_dim is None else size(layout.q_dim)
    k = v if layout.k_dim is None else size(layout.k_dim)

    # The output projection reads exactly the heads' outputs. That gives H; what is left of the keys' projection gives G.
    n_heads = _in_features(linears["o"]) // v
    group = k + (v if names["v"] == names["k"] else 0)
    others = n_heads * q if names["q"] == names["k"] else 0
    n_kv_heads = (_out_features(linears["k"]) - others) // group
    sizes = HeadSizes(n_heads, n_kv_heads, q, k, v)
    expected: dict[str, int] = {}
    for role, count, rows in _rows(sizes):
        expected[names[role]] = expected.get(names[role], 0) + count * rows
    widths = {names[role]: _out_features(linears[role]) for role, _, _ in _rows(sizes)}
    if (
        min(n_heads, n_kv_heads) < 1
        or n_heads % n_kv_heads
        or widths != expected
        or _in_features(linears["o"]) != n_heads * v
    ):
        raise ValueError(
            f"{what} has projections of widths { ({layout.module(r): widths[names[r]] for r, _, _ in _rows(sizes)}) } (out) "
            f"and {_in_features(linears['o'])} ({layout.o}, in), which do not divide into query heads of {q} rows, key "
            f"heads of {k} and value heads of {v}"
        )

    starts = _starts(sizes, names, layout)
    for projection, width in widths.items():
        parts = sorted(
            (start, start + rows)
            for role, _, rows in _rows(sizes)
            if names[role] == projection
            for start in starts[role]
        )
        ends = [(0, 0), *parts, (width, width)]
        if any(end != start for (_, end), (start, _) in pairwise(ends)):
            raise ValueError(f"{what} has a layout whose `order` does not cover '{projection}' exactly once")

    number = getattr(module, layout.layer, None)
    return AttentionGeometry(
        name=name,
        layer=number if isinstance(number, int) else _number_in(name),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=v,
        q=Units(names["q"], ROWS, starts["q"], q),
        k=Units(names["k"], ROWS, starts["k"], k),
        v=Units(names["v"], ROWS, starts["v"], v),
        o=Units(names["o"], COLUMNS, tuple(range(0, n_heads * v, v)), v),
    )


def _rows(sizes: HeadSizes) -> tuple[tuple[Role, int, int], ...]:
    """For each role whose units are rows: how many units, of how many rows each."""
    return (
        ("q", sizes.n_heads, sizes.q),
        ("k", sizes.n_kv_heads, sizes.k),
        ("v", sizes.n_kv_heads, sizes.v),
    )


def _starts(sizes: HeadSizes, names: dict[Role, str], layout: AttentionLayout) -> dict[Role, tuple[int, ...]]:
    """The first row of each unit of q, k and v."""
    if callable(layout.order):
        given = layout.order(sizes)
        return {role: tuple(given[role]) for role, _, _ in _rows(sizes)}
    # "blocks" is one group with everything in it
    n_groups = sizes.n_kv_heads if layout.order == "groups" else 1
    widths: dict[str, int] = {}  # of one group in each projection
    offsets: dict[Role, int] = {}
    for role, count, rows in _rows(sizes):
        offsets[role] = widths.get(names[role], 0)
        widths[names[role]] = offsets[role] + count // n_groups * rows
    return {
        role: tuple(
            unit // (count // n_groups) * widths[names[role]] + offsets[role] + unit % (count // n_groups) * rows
            for unit in range(count)
        )
        for role, count, rows in _rows(sizes)
    }


def _number_in(name: str) -> int:
    """The first number in a module's full name, or 0."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def _container(name: str) -> str:
    """The part of a module's full name before its first number: where the layers are."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0]] if numbers else parts[:-1])


def _by_address(
    model: nn.Module, modules: dict[str, nn.Module], found: list[AttentionGeometry]
) -> dict[Layer, AttentionGeometry]:
    """Tell the stacks apart, and put their names in front of the layers' numbers where there are several."""
    cross = {
        attention.name
        for attention in found
        if _CROSS_ATTENTION & set(attention.name.split("."))
        or getattr(modules[attention.name], "is_cross_attention", False) is True
    }
    # whoever attends to another sequence is a decoder, whatever it is called (BERT as a decoder is still an "encoder")
    decoders = {_container(name) for name in cross}
    stacks: dict[str, str] = {}
    for name in (attention.name for attention in found):
        parts = name.split(".")
        if name in cross:
            stacks[name] = "cross"
        elif _container(name) in decoders or "decoder" in parts:
            stacks[name] = "decoder"
        else:
            stacks[name] = "encoder" if "encoder" in parts else ""
    several = len(set(stacks.values())) > 1
    addressed: dict[Layer, AttentionGeometry] = {}
    for attention in found:
        stack = stacks[attention.name]
        layer = f"{stack}.{attention.layer}" if several else attention.layer
        other = next((a for a in found if stacks[a.name] != stack), attention) if several and not stack else None
        other = addressed.get(layer, other)
        if other is not None:
            raise ValueError(
                f"Unsupported attention in `model` ({type(model).__name__}): {_what(modules, attention.name)} and "
                f"{_what(modules, other.name)} belong to different stacks of attention, or to one layer, and cannot be "
                "told apart; supported are one stack and encoder-decoders. Pass the part of the model that is meant."
            )
        addressed[layer] = replace(attention, layer=layer)
    return {layer: addressed[layer] for layer in sorted(addressed, key=layer_order)}
