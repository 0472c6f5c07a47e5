"""`HeadSet`: an immutable, ordered set of attention heads."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..argument_checks import is_index
from ..files import read_json, write_json
from ..printable import shown
from .hub import HEADS_NAME, find_file, push_json


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


# The address of a layer: its number, or "<stack>.<number>" in a model with several stacks of attention, such as
# "encoder.0", "decoder.3" or "cross.3". To a type checker it is `int | Any` and not `int | str`: most code is for models
# with one stack and should not have to rule out the other kind.
Layer: TypeAlias = int | Any

_FORMAT = "p2d_peft.HeadSet"
# no more digits than any model has layers: a file may hold a number that takes minutes to read
_NUMBER = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)
_STACK_AND_NUMBER = re.compile(rf"([A-Za-z_]\w*)\.({_NUMBER.pattern})", re.ASCII)


class Head(NamedTuple):
    """
    The address of one query head.

    Args:
        layer (`int` or `str`):
            The layer, counted from 0. In models with several stacks of attention `"<stack>.<number>"`: `"encoder.0"`,
            `"decoder.0"` and `"cross.0"` are the first layers of encoder self-attention, decoder self-attention and
            cross-attention.
        head (`int`): The index within the layer, counted from 0.
    """

    layer: Layer
    head: int


def layer_order(layer: Layer) -> tuple[str, int]:
    """What layers are sorted by: the stack's name, then the number."""
    if not isinstance(layer, str):
        return "", layer
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


class HeadSet(Set, Hashable):
    """
    An immutable set of attention heads, ordered by layer (by stack and number) and then by index.

    It behaves like a `frozenset` of `(layer, head)` pairs (`in`, `len`, `==`, `<=`, `|`, `&`, `-`, `^`, usable as a
    dictionary key), iterates in order, and goes to JSON and back.

    Args:
        heads (`Iterable[tuple[int | str, int]]`, *optional*):
            The `(layer, head)` pairs, see [`Head`]. The order does not matter; a pair that is given twice is an error.

    Raises:
        `TypeError`: if an element is not a pair of integers, or of a string like `"encoder.0"` and an integer.
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
    >>> HeadSet([("encoder.1", 2), ("cross.0", 1)])  # of an encoder-decoder
    HeadSet({'cross.0': [1], 'encoder.1': [2]})
    ```
    """

    __slots__ = ("_heads", "_members")

    def __init__(self, heads: Iterable[tuple[Layer, int]] = ()) -> None:
        if not isinstance(heads, Iterable):
            raise TypeError(f"`heads` must hold (layer, head) pairs of integers, got {shown(heads)}.")
        members: list[Head] = []
        for pair in heads:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and is_layer(pair[0]) and is_index(pair[1])):
                raise TypeError(
                    f"`heads` must hold (layer, head) pairs of integers, got {shown(pair)}. A layer of an encoder-decoder is "
                    "a string like 'encoder.0', 'decoder.0' or 'cross.0'. For a mapping from layers to lists of heads "
                    "use `HeadSet.from_layers`."
                )
            head = Head(pair[0] if isinstance(pair[0], str) else int(pair[0]), int(pair[1]))
            if head.head < 0 or (not isinstance(head.layer, str) and head.layer < 0):
                raise ValueError(f"`heads` must hold indices counted from 0, got {tuple(head)}.")
            members.append(head)
        self._heads: tuple[Head, ...] = tuple(sorted(members, key=lambda head: (layer_order(head.layer), head.head)))
        self._members = frozenset(self._heads)
        if len(self._members) != len(self._heads):
            twice = next(a for a, b in zip(self._heads, self._heads[1:], strict=False) if a == b)
            raise ValueError(f"`heads` holds {tuple(twice)} more than once; give each head once.")

    @classmethod
    def from_layers(cls, layers: Mapping[Any, Iterable[int]]) -> HeadSet:
        """
        Build the set from a mapping of layers to the indices of their heads.

        Args:
            layers (`Mapping[int | str, Iterable[int]]`):
                For each layer, its heads. Strings of digits, as JSON makes them of numbers, become numbers.

        Raises:
            `TypeError` and `ValueError`: as [`HeadSet`] does.
        """
        if not isinstance(layers, Mapping):
            raise TypeError(f"`layers` must be a mapping from layers to lists of heads, got {shown(layers)}.")
        for layer, heads in layers.items():
            if isinstance(heads, str) or not isinstance(heads, Iterable):
                raise TypeError(
                    f"`layers` must map each layer to a list of heads, got {shown(heads)} for {shown(layer)}."
                )
        return cls(
            (int(layer) if isinstance(layer, str) and _NUMBER.fullmatch(layer) else layer, head)
            for layer, heads in layers.items()
            for head in heads
        )

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> HeadSet:
        # Set's operators may hand over an element of both operands twice, so they go through a set first.
        return cls(set(it))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that hold at least one head of the set, in ascending order."""
        return tuple(self.by_layer())

    def by_layer(self) -> dict[Layer, list[int]]:
        """The set as a new dictionary from each layer to the ascending list of its heads."""
        layers: dict[Layer, list[int]] = {}
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
        try:
            return cls.from_layers(data["heads"])
        except (TypeError, ValueError) as error:  # the data is wrong, not the call
            raise ValueError(f"`data` is not a head set: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the set as JSON to the file `path`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """
        Read a set from a JSON file that [`HeadSet.save`] wrote.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `ValueError`: if the file holds no head set; the message names the file.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"'{path}' holds no head set. {error}") from error

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the set into a folder, as `p2d_heads.json`; missing folders are made."""
        self.save(Path(save_directory) / HEADS_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> HeadSet:
        """
        Read a set from a folder or from the Hub, be it by itself there or beside an adapter that `P2DTrainer` trained.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                A folder that [`HeadSet.save_pretrained`] or `P2DTrainer` wrote, or the id of a model repository.
            revision (`str`, *optional*): Branch, tag or commit of the repository; the main branch by default.
            token (`str` or `bool`, *optional*): Access token; by default the one that is logged in with, if any.
            subfolder (`str`, *optional*): Where in the folder or the repository the file is.
            **hub_kwargs (*optional*):
                What else [`~huggingface_hub.hf_hub_download`] takes: `cache_dir`, `local_files_only`, ...

        Raises:
            `FileNotFoundError`: if the folder or the repository has no `p2d_heads.json`.
            `ValueError`: if that file holds no head set.

        Example:

        ```python
        >>> from p2d_peft import HeadSet, HeadSparseConfig

        >>> heads = HeadSet.from_pretrained("user/adapter")
        >>> config = HeadSparseConfig(heads=heads, task_type="CAUSAL_LM")
        ```
        """
        hub_kwargs |= {"revision": revision, "token": token}
        return cls.load(find_file(pretrained_model_name_or_path, HEADS_NAME, subfolder, hub_kwargs))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload heads",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """
        Upload the set to a model repository of the Hub, as `p2d_heads.json`. Other files there stay as they are.

        Args:
            repo_id (`str`): The repository, `"user/name"`; made if there is none.
            commit_message (`str`, *optional*, defaults to `"Upload heads"`): First line of the commit's message.
            private (`bool`, *optional*): Whether a repository that is made is private.
            token (`str` or `bool`, *optional*): Access token; by default the one that is logged in with.
            revision (`str`, *optional*): The branch to commit to; the main branch by default.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request in place of a commit.

        Returns:
            [`~huggingface_hub.CommitInfo`]
        """
        return push_json(
            self.to_dict(),
            HEADS_NAME,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

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
        return f"HeadSet({self.by_layer()})"


def is_layer(value: object) -> bool:
    """Whether a value has the form of a layer's address, see [`Head`]."""
    return _STACK_AND_NUMBER.fullmatch(value) is not None if isinstance(value, str) else is_index(value)
