"""`HeadSet`: an immutable, ordered set of attention heads."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json, write_json


_FORMAT = "p2d_peft.HeadSet"


class Head(NamedTuple):
    """The address of one query head: its layer and its index within that layer, both counted from 0."""

    layer: int
    head: int


class HeadSet(Set, Hashable):
    """
    An immutable set of attention heads, ordered by layer and then by index.

    It behaves like a `frozenset` of `(layer, head)` pairs (`in`, `len`, `==`, `<=`, `|`, `&`, `-`, `^`, usable as a
    dictionary key), iterates in order, and goes to JSON and back.

    Args:
        heads (`Iterable[tuple[int, int]]`, *optional*):
            The `(layer, head)` pairs. The order does not matter; a pair that is given twice is an error.

    Raises:
        `TypeError`: if an element is not a pair of integers.
        `ValueError`: if an index is negative or a pair is given twice.

    Example:

    ```python
    >>> from p2d_peft import HeadSet

    >>> heads = HeadSet([(2, 3), (0, 1), (2, 0)])
    >>> heads
    HeadSet({0: [1], 2: [0, 3]})
    >>> heads | HeadSet([(5, 5)])
    HeadSet({0: [1], 2: [0, 3], 5: [5]})
    >>> (2, 3) in heads, len(heads), heads.layers
    (True, 3, (0, 2))
    ```
    """

    __slots__ = ("_heads", "_members")

    def __init__(self, heads: Iterable[tuple[int, int]] = ()) -> None:
        members: list[Head] = []
        for pair in heads:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_index(part) for part in pair)):
                raise TypeError(
                    f"`heads` must hold (layer, head) pairs of integers, got {pair!r}. For a mapping from layers to "
                    "lists of heads use `HeadSet.from_layers`."
                )
            head = Head(int(pair[0]), int(pair[1]))
            if min(head) < 0:
                raise ValueError(f"`heads` must hold indices counted from 0, got {tuple(head)}.")
            members.append(head)
        self._heads: tuple[Head, ...] = tuple(sorted(members))
        self._members = frozenset(self._heads)
        if len(self._members) != len(self._heads):
            twice = next(a for a, b in zip(self._heads, self._heads[1:], strict=False) if a == b)
            raise ValueError(f"`heads` holds {tuple(twice)} more than once; give each head once.")

    @classmethod
    def from_layers(cls, layers: Mapping[int, Iterable[int]] | Mapping[str, Iterable[int]]) -> HeadSet:
        """
        Build the set from a mapping of layers to the indices of their heads.

        Args:
            layers (`Mapping[int | str, Iterable[int]]`):
                For each layer, its heads. Keys may be strings of digits, as JSON makes them.
        """
        return cls(
            (int(layer) if isinstance(layer, str) and layer.isdecimal() else layer, head)  # type: ignore[misc]
            for layer, heads in layers.items()
            for head in heads
        )

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> HeadSet:
        # Set's operators may hand over an element of both operands twice, so they go through a set first.
        return cls(set(it))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold at least one head of the set, in ascending order."""
        return tuple(sorted({head.layer for head in self._heads}))

    def by_layer(self) -> dict[int, list[int]]:
        """The set as a new dictionary from each layer to the ascending list of its heads."""
        layers: dict[int, list[int]] = {}
        for layer, head in self._heads:
            layers.setdefault(layer, []).append(head)
        return layers

    def to_dict(self) -> dict[str, Any]:
        """The set as plain JSON types; [`HeadSet.from_dict`] reads it back."""
        return {"format": _FORMAT, "heads": {str(layer): heads for layer, heads in self.by_layer().items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadSet:
        """
        Read what [`HeadSet.to_dict`] wrote.

        Raises:
            `ValueError`: if `data` is not a head set.
        """
        if (
            not isinstance(data, Mapping)
            or data.get("format") != _FORMAT
            or not isinstance(data.get("heads"), Mapping)
        ):
            raise ValueError(f"`data` is not a head set: expected a mapping with 'format': '{_FORMAT}' and 'heads'.")
        return cls.from_layers(data["heads"])

    def save(self, path: str | Path) -> None:
        """Write the set as JSON to the file `path`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read a set from a JSON file that [`HeadSet.save`] wrote."""
        return cls.from_dict(read_json(path))

    def __contains__(self, head: object) -> bool:
        return head in self._members

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __hash__(self) -> int:
        return self._hash()

    def __reduce__(self) -> tuple[type[HeadSet], tuple[tuple[Head, ...]]]:
        return HeadSet, (self._heads,)

    def __repr__(self) -> str:
        return f"HeadSet({json.dumps(self.by_layer()).replace(chr(34), '')})"


def _is_index(value: object) -> bool:
    # numpy and torch integers answer to __index__ too; a bool is an int in Python but not an index
    return hasattr(value, "__index__") and not isinstance(value, bool)
