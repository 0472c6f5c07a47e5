"""`HeadScores`: how much each attention head matters, and by which method this was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..argument_checks import check_count, check_share, is_index
from ..files import read_json, write_json
from ..json_fields import checked_fields
from ..printable import shown
from .choice import (
    Bounds,
    PerLayer,
    at_one_end,
    best_cells,
    best_for_the_time,
    even_bound,
    layer_bounds,
    number_of_heads,
)
from .comparison import Comparison, spearman
from .head_set import HeadSet, Layer, is_layer, layer_order


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = "p2d_peft.HeadScores"


@dataclass(frozen=True, eq=False)
class HeadScores:
    """
    A table of scores, one for each attention head; higher means that the head matters more.

    Args:
        values (`torch.Tensor`):
            Shape (L, H), float64 on the CPU. NaN where the model has no such head.
        method (`str`):
            Name of the localization method.
        seed (`int`, *optional*):
            Seed that the method ran with.
        n_samples (`int`, *optional*):
            Number of samples that the method saw; None where it looks at none.
        model_id (`str`, *optional*):
            The model the scores belong to.
        seconds (`float`, *optional*):
            What the localization cost.
        layers (`tuple[int | str, ...]`, *optional*):
            The layer that each row stands for, as [`Head`] names it: `0, 1, ...` by default, and addresses such as
            `"encoder.0"` in a model with several stacks of attention.
        n_kv_heads (`tuple[int, ...]`, *optional*):
            G for each row, the number of key/value heads (groups); 0 in rows without heads. By default each head has keys
            and values of its own.

    Raises:
        `ValueError`: if `values` is not a two-dimensional table or holds an infinity, `layers` does not name each row
            once and in ascending order, or `n_kv_heads` does not divide the heads of each.
    """

    values: torch.Tensor
    method: str
    seed: int | None = None
    n_samples: int | None = None
    model_id: str | None = None
    seconds: float | None = None
    layers: tuple[Layer, ...] = ()
    n_kv_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float64)
        if values.dim() != 2 or values.isinf().any():
            raise ValueError(
                f"`values` must be a finite table of shape (layers, heads), got shape {tuple(values.shape)}"
                f"{' with infinities' if values.isinf().any() else ''}."
            )
        layers = tuple(self.layers) or tuple(range(len(values)))
        if not all(is_layer(layer) and (isinstance(layer, str) or layer >= 0) for layer in layers):
            raise ValueError(
                f"`layers` must hold numbers counted from 0, or strings like 'encoder.0', got {shown(layers)}."
            )
        if len(set(layers)) != len(values) or len(layers) != len(values):
            raise ValueError(f"`layers` must name each of the {len(values)} rows of `values` once, got {layers}.")
        if list(layers) != sorted(layers, key=layer_order):
            raise ValueError(
                f"`layers` must be in ascending order, which `first_layers` goes by, got {shown(layers)}."
            )
        heads = (~values.isnan()).sum(dim=1).tolist()
        n_kv_heads = tuple(self.n_kv_heads) or tuple(heads)
        if len(n_kv_heads) != len(heads) or not all(map(_divides, n_kv_heads, heads)):
            raise ValueError(
                f"`n_kv_heads` must be the number of key/value heads of each row, which have {heads} heads, got "
                f"{n_kv_heads}."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "n_kv_heads", n_kv_heads)

    @property
    def n_heads(self) -> int:
        """The number of heads that have a score."""
        return int((~self.values.isnan()).sum())

    def top(
        self,
        ratio: float | None = None,
        *,
        k: int | None = None,
        per_layer: PerLayer = None,
        per_group: int | None = None,
        first_layers: float | None = None,
        last_layers: float | None = None,
        cost_aware: bool = False,
    ) -> HeadSet:
        """
        The heads with the highest scores.

        Args:
            ratio (`float`, *optional*, defaults to 0.1):
                Share of all heads to take, in (0, 1]; rounded, and at least one head. The paper takes 10 %.
            k (`int`, *optional*):
                How many heads to take, in place of `ratio`.
            per_layer (`int`, `tuple[int, int]` or `"even"`, *optional*):
                Take at most so many heads of one layer, which spreads the choice over the depth. A pair `(least, most)`
                also takes at least `least` heads of each layer that has heads (all, where it has fewer); either may be
                None. `"even"` takes the smallest bound that leaves as many heads as are asked for, as [`P2DTrainer`]
                does. By default the ranking is global, as in the paper.
            per_group (`int`, *optional*):
                Take at most so many heads of one key/value group. Heads of a group share their keys and values, which
                are trained once: with `per_group=1` each chosen head brings all of its weights. By default there is no
                such bound.
            first_layers (`float`, *optional*):
                Take heads only of this share of the layers, counted from the first one, in (0, 1]; rounded, at least one
                layer, and as many more as it takes for so many heads within the bounds. What only these heads do costs
                no more than their part of a forward pass. In a model with several stacks, of each of them.
            last_layers (`float`, *optional*):
                The same counted from the last one. When only these heads are trained, the backward pass ends there.
            cost_aware (`bool`, *optional*, defaults to `False`):
                Choose the heads for which the sum of their scores divided by the time of a training step is highest. The
                backward pass ends at the lowest chosen layer `l`, so a step takes `1 + (L - l) / L` forward passes:
                for each `l`, the best heads from there up are considered. `least` then holds from `l` upwards. Scores
                must be at least 0 and mean more the larger they are, as those of all methods but `ablation` and
                `trained` do, and the model must have one stack of attention.

        Raises:
            `ValueError`: if `ratio`, `first_layers` or `last_layers` is not in (0, 1], there are not `k` heads, two that
                exclude each other are given, no choice of so many heads keeps to `per_layer` and `per_group`, or the
                scores do not admit `cost_aware`.
        """
        count = number_of_heads(ratio, k, self.n_heads)
        if per_group is not None:
            check_count("per_group", per_group)
        if cost_aware:
            self._check_cost_aware()
        choose = best_for_the_time if cost_aware else best_cells
        groups, cells = self._groups(), None
        for values in self._parts(first_layers, last_layers):
            if count > int((~values.isnan()).sum()):
                continue
            of_layer = even_bound(values, count) if per_layer == "even" else per_layer
            least, most = layer_bounds(of_layer)
            bounds = Bounds(least, most, math.inf if per_group is None else per_group, groups)
            cells = choose(values, count, bounds)
            if cells is not None:
                break
        if cells is None:
            asked = f"`ratio`={ratio or 0.1}" if k is None else f"`k`={k}"
            if per_group is not None and best_cells(self.values, count, Bounds(least, most)) is not None:
                raise ValueError(
                    f"`per_group`={per_group} leaves fewer heads than the {count} of {self.n_heads} that {asked} asks "
                    "for; raise `per_group` or ask for fewer heads."
                )
            raise self._unkept(asked, count, of_layer)
        return HeadSet((self.layers[row], head) for row, head in cells)

    def _parts(self, first_layers: float | None, last_layers: float | None) -> Iterator[torch.Tensor]:
        """The tables to choose from, one after the other until one will do; the last one is the whole."""
        shares = {"first_layers": first_layers, "last_layers": last_layers}
        given = {name: share for name, share in shares.items() if share is not None}
        if len(given) > 1:
            raise ValueError(f"Give only one of `first_layers` and `last_layers`, got {given}.")
        if not given:
            return iter([self.values])
        ((name, share),) = given.items()
        check_share(name, share)
        return at_one_end(self.values, self._stacks(), share, last=name == "last_layers")

    def _stacks(self) -> list[str]:
        """The stack of each row: `"encoder"` of `"encoder.0"`, and `""` where there is one only."""
        return [layer.rpartition(".")[0] if isinstance(layer, str) else "" for layer in self.layers]

    def _groups(self) -> torch.Tensor:
        """The key/value group of each head within its row: shape (L, H), int64."""
        sizes = [
            h // g if g else 1 for h, g in zip((~self.values.isnan()).sum(1).tolist(), self.n_kv_heads, strict=True)
        ]
        return torch.arange(self.values.shape[1]) // torch.tensor(sizes)[:, None]

    def _unkept(self, asked: str, count: int, per_layer: int | tuple[int | None, int | None] | None) -> ValueError:
        """The error for bounds that no choice of `count` heads keeps to."""
        least, most = layer_bounds(per_layer)
        heads_of_rows = [n for n in (~self.values.isnan()).sum(dim=1).tolist() if n]
        left = int(sum(min(most, n) for n in heads_of_rows))
        if left < count:
            return ValueError(
                f"`per_layer`={per_layer} leaves {left} heads, but {asked} asks for {count} of {self.n_heads}; raise "
                "`per_layer` or ask for fewer heads."
            )
        needed = sum(min(least, n) for n in heads_of_rows)
        return ValueError(
            f"`per_layer`={per_layer} takes at least {needed} heads of {len(heads_of_rows)} layers, but {asked} asks for "
            f"{count} of {self.n_heads}, and no choice keeps to both; lower `per_layer` or ask for another number."
        )

    def _check_cost_aware(self) -> None:
        stacks = sorted({*self._stacks()} - {""})
        if stacks:
            raise ValueError(
                f"`cost_aware` is for models with one stack of attention, but these scores are of {', '.join(stacks)}; "
                "leave it out."
            )
        if (self.values < 0).any():
            raise ValueError(
                f"`cost_aware` divides sums of scores by the time of a step, but `method`={self.method!r} gave scores "
                f"below 0 (least {float(self.values.nan_to_num(0).min()):.3g}), for which that has no meaning; leave it "
                "out or use another method."
            )

    def compare(self, other: HeadScores, ratio: float | None = None, *, k: int | None = None) -> Comparison:
        """
        How much this table and another one of the same heads agree.

        Args:
            other ([`HeadScores`]): The other table.
            ratio (`float`, *optional*, defaults to 0.1): Share of the heads to choose by each for the overlap.
            k (`int`, *optional*): How many heads to choose, in place of `ratio`.

        Returns:
            [`Comparison`]: Spearman's rank correlation, and the overlap of the choices beside that of chance.

        Raises:
            `ValueError`: if the tables are not of the same heads, or `ratio` or `k` is out of range.
        """
        if not isinstance(other, HeadScores):
            raise TypeError(f"`other` must be a `HeadScores`, got {type(other).__name__}.")
        there = ~self.values.isnan()
        if self.layers != other.layers or not torch.equal(there, ~other.values.isnan()):
            raise ValueError(
                f"`other` is not a table of the same heads: it has {other.n_heads} in {len(other.layers)} layers "
                f"({other.layers[0]}, ...) and this one {self.n_heads} in {len(self.layers)} ({self.layers[0]}, ...), or "
                "others are missing. Compare scores of one model."
            )
        count = number_of_heads(ratio, k, self.n_heads)
        return Comparison(
            spearman=spearman(self.values[there], other.values[there]),
            overlap=len(self.top(k=count) & other.top(k=count)) / count,
            chance=count / self.n_heads,
            k=count,
        )

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain JSON types; [`HeadScores.from_dict`] reads them back."""
        rows = [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()]
        return {
            "format": _FORMAT,
            **asdict(self),
            "values": rows,
            "layers": list(self.layers),
            "n_kv_heads": list(self.n_kv_heads),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadScores:
        """
        Read what [`HeadScores.to_dict`] wrote.

        Raises:
            `ValueError`: if `data` is not a table of head scores.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f"`data` is not a table of head scores: expected a mapping with 'format': '{_FORMAT}'.")
        try:
            return cls(**checked_fields(cls, {**data, "values": _table(data.get("values"))}))
        except ValueError as error:
            raise ValueError(f"`data` is not a table of head scores: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON to the file `path`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """
        Read scores from a JSON file that [`HeadScores.save`] wrote.

        Raises:
            `FileNotFoundError`: if there is no such file.
            `ValueError`: if the file holds no scores; the message names the file.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"'{path}' holds no head scores. {error}") from error

    def plot(self, heads: HeadSet | None = None, ax: Axes | None = None) -> Axes:
        """
        Draw the table as a heatmap, layers downwards and heads to the right.

        Args:
            heads (`HeadSet`, *optional*): Heads to mark with a frame.
            ax (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure by default.

        Returns:
            `matplotlib.axes.Axes`: the axes with the heatmap.

        Raises:
            `ImportError`: if matplotlib is missing.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise ImportError("`HeadScores.plot` needs matplotlib: `pip install 'p2d_peft[plots]'`.") from error
        n_layers, n_heads = self.values.shape
        if ax is None:
            _, ax = pyplot.subplots(figsize=(2 + 0.35 * n_heads, 1.5 + 0.25 * n_layers), layout="constrained")
        image = ax.imshow(self.values.numpy(), aspect="auto", cmap="viridis")
        ax.figure.colorbar(image, ax=ax, label=f"{self.method} score")
        ax.set(xlabel="head", ylabel="layer", title=self.model_id or "")
        ax.set_xticks(range(n_heads))
        ax.set_yticks(range(n_layers), labels=[str(layer) for layer in self.layers])
        for layer, head in heads or ():
            row = self.layers.index(layer)
            ax.add_patch(Rectangle((head - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
        return ax


def _divides(groups: Any, heads: int) -> bool:
    """Whether so many heads can be parted into so many groups; no heads into none."""
    return is_index(groups) and groups >= 0 and (heads % groups if groups else heads) == 0


def _table(rows: Any) -> torch.Tensor:
    """The table that a JSON list of rows stands for, with NaN for None."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"'values' must be a list of rows, got {shown(rows)}.")
    if len(set(map(len, rows))) > 1:
        raise ValueError(f"'values' must have rows of one length, got {sorted(set(map(len, rows)))}.")
    for value in (value for row in rows for value in row):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"'values' must hold numbers and None, got {shown(value)}.")
    try:
        numbers = [[math.nan if value is None else float(value) for value in row] for row in rows]
    except OverflowError as error:
        raise ValueError("'values' holds an integer that is too long for a float.") from error
    return torch.tensor(numbers, dtype=torch.float64)
