"""The configuration of HeadSparse: which attention heads to train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ...heads.geometry import ModelGeometry
from ...heads.head_set import HeadSet
from ..peft_type import add_peft_type


HEAD_SPARSE = add_peft_type("HEAD_SPARSE")


@dataclass
class HeadSparseConfig(PeftConfig):
    """
    Configuration of a [`HeadSparseModel`], which trains chosen attention heads and nothing else.

    Of each chosen query head these weights are trained: its rows of the query projection, the rows of the key and
    value projections of its group (under grouped-query attention several heads share one; it is trained once), and
    its columns of the output projection. Biases and norms stay as they are.

    Args:
        heads (`HeadSet`, `Mapping[int, Iterable[int]]`, `Iterable[int]` or `None`, *optional*):
            The query heads to train, counted from 0: a [`~p2d_peft.HeadSet`], a mapping from layers to the heads of
            each, or a list of heads that is taken in every layer. `None` means all heads of the model. The attribute
            holds plain JSON types: a dictionary from layers to ascending lists of heads, an ascending list, or `None`.
        target_modules (`list[str]` or `str`, *optional*):
            Which of the projections that belong to the chosen heads to train. By default (`None`, or `"all-linear"`)
            all of them, which the model's geometry tells. A list of names (compared with a module's full name or with
            its ending) or a regular expression (compared with the full name) narrows them; it never adds a module
            that has no part in a chosen head.
        exclude_modules (`list[str]` or `str`, *optional*):
            Projections to leave alone, as names or as a regular expression, matched like `target_modules`.
        modules_to_save (`list[str]`, *optional*):
            Modules beside the heads to train in full and to save with the adapter, such as the classifier of a
            sequence classification model.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start from deltas of zero, so that the adapted model begins as the base model. `False` draws small random
            deltas instead; it is meant for tests.

    Raises:
        `TypeError`: if `heads` holds anything that is not an integer.
        `ValueError`: if `heads` is empty or holds a negative index or an index twice.

    Example:

    ```python
    >>> from p2d_peft import HeadSet, HeadSparseConfig

    >>> HeadSparseConfig(heads=HeadSet([(3, 0), (3, 7), (11, 2)])).heads
    {3: [0, 7], 11: [2]}
    ```
    """

    heads: HeadSet | Mapping[int, Iterable[int]] | Iterable[int] | None = field(
        default=None,
        metadata={
            "help": (
                "The query heads to train, counted from 0: a HeadSet, a mapping from layers to lists of heads, or a "
                "list of heads that is taken in every layer. None means all heads of the model."
            )
        },
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
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Modules beside the heads to train in full and to save with the adapter, such as the randomly "
                "initialized classifier of a sequence classification model."
            )
        },
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
        if isinstance(self.target_modules, str) and self.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            self.target_modules = None
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def set_heads(self, heads: HeadSet | Mapping[int, Iterable[int]] | Iterable[int] | None) -> None:
        """
        Choose other heads.

        Args:
            heads (`HeadSet`, `Mapping[int, Iterable[int]]`, `Iterable[int]` or `None`): See [`HeadSparseConfig`].

        Raises:
            `TypeError` and `ValueError`: as [`HeadSparseConfig`] does.
        """
        self.heads = _plain_heads(heads)

    def heads_in(self, layer: int, n_heads: int) -> list[int]:
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


def _plain_heads(heads: Any) -> dict[int, list[int]] | list[int] | None:
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
            # a bool has an index too, but it is none
            if not hasattr(head, "__index__") or isinstance(head, bool):
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
