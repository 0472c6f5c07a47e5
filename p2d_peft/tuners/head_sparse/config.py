"""The configuration of HeadSparse: which attention heads to train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ...argument_checks import is_index
from ...heads.geometry import ROLES, AttentionGeometry, ModelGeometry, Role
from ...heads.head_set import HeadSet, Layer, layer_order
from ..peft_type import add_peft_type


HEAD_SPARSE = add_peft_type("HEAD_SPARSE")
_BIAS = ("none", "all", "head_sparse_only")


@dataclass
class HeadSparseConfig(PeftConfig):
    """
    Configuration of a [`HeadSparseModel`], which trains chosen attention heads and nothing else.

    Of each chosen query head these weights are trained: its rows of the query projection, the rows of the key and
    value projections of its group (under grouped-query attention several heads share one; it is trained once), and
    its columns of the output projection. Biases and norms stay as they are, unless `bias` says otherwise.

    Args:
        heads (`HeadSet`, `Mapping[int | str, Iterable[int]]`, `Iterable[int]` or `None`, *optional*):
            The query heads to train, counted from 0: a [`~p2d_peft.HeadSet`], a mapping from layers to the heads of
            each, or a list of heads that is taken in every layer. `None` means all heads of the model. The attribute
            holds plain JSON types: a dictionary from layers to ascending lists of heads, an ascending list, or `None`.
        projections (`list[str]`, *optional*, defaults to all four):
            Which of a head's slices to train: `"q"`, `"k"`, `"v"` and `"o"`. The attribute is in this order.
        share_kv (`bool`, *optional*, defaults to `True`):
            Train the keys and values of each chosen head's group, which the group's other heads use too. `False`
            leaves the key and value projections alone, so that no other head is touched.
        r (`int`, *optional*):
            The rank of a low-rank delta within each slice: parameters `head_sparse_A` of shape (r, in) and
            `head_sparse_B` of shape (out, r). By default (`None`) each weight of a slice is trained.
        target_modules (`list[str]` or `str`, *optional*):
            Which of the projections that belong to the chosen heads to train. By default (`None`, or `"all-linear"`)
            all of them, which the model's geometry tells. A list of names (compared with a module's full name or with
            its ending) or a regular expression (compared with the full name) narrows them; it never adds a module
            that has no part in a chosen head.
        exclude_modules (`list[str]` or `str`, *optional*):
            Projections to leave alone, as names or as a regular expression, matched like `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            The numbers of the layers to train, which narrows `heads`. By default all layers with chosen heads.
        layers_pattern (`list[str]` or `str`, *optional*):
            Only with `layers_to_transform`: the name of the list of layers that those numbers count in, such as
            `"decoder.layers"` in a model with several. By default the numbers are those of any stack.
        modules_to_save (`list[str]`, *optional*):
            Modules beside the heads to train in full and to save with the adapter, such as the classifier of a
            sequence classification model.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings to train too: a list for the model's input embeddings, or a mapping from names of
            embedding layers to lists.
        bias (`str`, *optional*, defaults to `"none"`):
            Which of the model's biases to train, in full and in place: `"none"`, `"all"` or `"head_sparse_only"`
            (those of the projections with a delta). Disabling or merging the adapter does not undo their training, and
            only one adapter of a model may have it.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start from deltas of zero, so that the adapted model begins as the base model. `False` draws small random
            deltas instead; it is meant for tests.

    Raises:
        `TypeError`: if `heads` holds anything that is not an integer.
        `ValueError`: if `heads` is empty or holds a negative index or an index twice, or if another field has a value
            that it cannot have; the message names it and what is valid.

    Example:

    ```python
    >>> from p2d_peft import HeadSet, HeadSparseConfig

    >>> HeadSparseConfig(heads=HeadSet([(3, 0), (3, 7), (11, 2)])).heads
    {3: [0, 7], 11: [2]}
    ```
    """

    heads: HeadSet | Mapping[Layer, Iterable[int]] | Iterable[int] | None = field(
        default=None,
        metadata={
            "help": (
                "The query heads to train, counted from 0: a HeadSet, a mapping from layers to lists of heads, or a "
                "list of heads that is taken in every layer. None means all heads of the model."
            )
        },
    )
    projections: Iterable[Role] = field(
        default=ROLES,
        metadata={"help": "Which of a head's slices to train: any of q, k, v and o."},
    )
    share_kv: bool = field(
        default=True,
        metadata={
            "help": (
                "Train the keys and values of each chosen head's group, which the group's other heads use too. False "
                "leaves the key and value projections alone."
            )
        },
    )
    r: int | None = field(
        default=None,
        metadata={"help": "The rank of a low-rank delta within each slice. None trains each weight of a slice."},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "Names or a regular expression that narrow which projections of the chosen heads are trained. None "
                "means all of them; they are read off the model."
            )
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regular expression of projections to leave alone."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "The numbers of the layers to train, which narrows the heads. None means all layers."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The name of the list of layers that `layers_to_transform` counts in, such as decoder.layers."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules beside the heads to train in full and to save with the adapter, such as the randomly "
                "initialized classifier of a sequence classification model."
            )
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": (
                "Tokens whose embeddings to train too: a list for the input embeddings, or a mapping from names of "
                "embedding layers to lists."
            )
        },
    )
    bias: Literal["none", "all", "head_sparse_only"] = field(
        default="none",
        metadata={"help": "Which of the model's biases to train: none, all or head_sparse_only."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "True starts from deltas of zero, so that the adapted model begins as the base model. False draws "
                "small random deltas; it is meant for tests."
            )
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HEAD_SPARSE
        self.set_heads(self.heads)
        self.projections = _checked_projections(self.projections, self.share_kv)
        if self.r is not None:
            if not is_index(self.r) or self.r < 1:
                raise ValueError(f"`r` must be an integer of at least 1, or None for the full slices, got {self.r!r}.")
            self.r = int(self.r)  # JSON has no other integers
        self.layers_to_transform = _checked_layers(self.layers_to_transform)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            self.target_modules = None
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` ({self.layers_pattern!r}) says what `layers_to_transform` counts; give both or neither."
            )
        if self.bias not in _BIAS:
            raise ValueError(f"`bias` must be one of {', '.join(map(repr, _BIAS))}, got {self.bias!r}.")
        if not isinstance(self.init_weights, bool):  # LoRA has names of methods there
            raise ValueError(
                "`init_weights` must be True, for deltas of zero, or False, for small random ones, got "
                f"{self.init_weights!r}."
            )

    def set_heads(self, heads: HeadSet | Mapping[Layer, Iterable[int]] | Iterable[int] | None) -> None:
        """
        Choose other heads.

        Args:
            heads (`HeadSet`, `Mapping[int | str, Iterable[int]]`, `Iterable[int]` or `None`): See [`HeadSparseConfig`].

        Raises:
            `TypeError` and `ValueError`: as [`HeadSparseConfig`] does.
        """
        self.heads = _plain_heads(heads)

    def roles(self) -> list[Role]:
        """The roles that are trained, in the order of `ROLES`."""
        return [role for role in ROLES if role in self.projections and (self.share_kv or role not in ("k", "v"))]

    def transforms(self, attention: AttentionGeometry) -> bool:
        """Whether `layers_to_transform` has the layer of an attention module."""
        if self.layers_to_transform is None or self.layers_to_transform == []:  # as PEFT has it
            return True
        layers = self.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        if not self.layers_pattern:
            return layer_order(attention.layer)[1] in layers
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        # the first number after the first pattern that is in the name, as PEFT reads it
        matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", f"{attention.name}.") for pattern in patterns)
        match = next(filter(None, matches), None)
        return match is not None and int(match[1]) in layers

    def heads_in(self, layer: Layer, n_heads: int) -> list[int]:
        """The chosen heads of one layer, which has `n_heads`, in ascending order."""
        if isinstance(self.heads, dict):
            return self.heads.get(layer, [])
        return list(range(n_heads)) if self.heads is None else list(self.heads)

    def head_set(self, geometry: ModelGeometry) -> HeadSet:
        """
        The chosen heads of a model.

        Args:
            geometry (`ModelGeometry`): The model's geometry.

        Raises:
            `ValueError`: if the model lacks one of the heads; the message names it and the valid range.
        """
        if isinstance(self.heads, dict):
            return geometry.check(HeadSet.from_layers(self.heads))
        return geometry.check(
            HeadSet(
                (layer, head)
                for layer, attention in geometry.items()
                for head in self.heads_in(layer, attention.n_heads)
            )
        )


def _checked_projections(projections: Any, share_kv: bool) -> list[Role]:
    """`projections` as a list in the order of `ROLES`."""
    if isinstance(projections, str) or not isinstance(projections, Iterable):
        raise ValueError(f"`projections` must be a list of some of {', '.join(ROLES)}, got {projections!r}.")
    given = list(projections)
    for projection in given:
        if projection not in ROLES:
            raise ValueError(f"`projections` holds {projection!r}; valid are {', '.join(ROLES)}.")
    ordered = [role for role in ROLES if role in given]
    if len(ordered) != len(given):
        raise ValueError(f"`projections` holds one more than once: {given}.")
    if not ordered:
        raise ValueError(f"`projections` is empty; give at least one of {', '.join(ROLES)}.")
    if not share_kv and set(ordered) <= {"k", "v"}:
        raise ValueError(f"`share_kv=False` leaves nothing to train of `projections` ({', '.join(ordered)}).")
    return ordered


def _checked_layers(layers: Any) -> list[int] | int | None:
    """`layers_to_transform` in plain JSON types."""
    if layers is None:
        return None
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        given = list(layers)
        if all(map(is_index, given)):
            return [int(layer) for layer in given]
    elif is_index(layers):
        return int(layers)
    raise ValueError(f"`layers_to_transform` must be the number of a layer or a list of them, got {layers!r}.")


def _plain_heads(heads: Any) -> dict[Layer, list[int]] | list[int] | None:
    """`heads` in plain JSON types, checked as far as that goes without a model."""
    if heads is None:
        return None
    if isinstance(heads, HeadSet):
        by_layer = heads.by_layer()
    elif isinstance(heads, Mapping):
        for layer, indices in heads.items():
            if isinstance(indices, str) or not isinstance(indices, Iterable):
                raise TypeError(
                    f"`heads` must map each layer to a list of heads, got {indices!r} for layer {layer!r}."
                )
        by_layer = HeadSet.from_layers(heads).by_layer()
    elif isinstance(heads, Iterable) and not isinstance(heads, str):
        in_every_layer: list[int] = []
        for head in heads:
            if not is_index(head):
                raise TypeError(
                    f"`heads` as a list must hold the integers of the heads to train in every layer, got {head!r}. For "
                    "(layer, head) pairs pass a `HeadSet`."
                )
            if head < 0:
                raise ValueError(f"`heads` must hold indices counted from 0, got {head}.")
            if head in in_every_layer:
                raise ValueError(f"`heads` holds {head} more than once; give each head once.")
            in_every_layer.append(int(head))
        if not in_every_layer:
            raise ValueError("`heads` is empty; give at least one head, or None for all heads.")
        return sorted(in_every_layer)
    else:
        raise TypeError(
            "`heads` must be a HeadSet, a mapping from layers to lists of heads, a list of heads or None, got "
            f"{type(heads).__name__}."
        )
    if not by_layer:
        raise ValueError("`heads` is empty; give at least one (layer, head) pair, or None for all heads.")
    return by_layer
