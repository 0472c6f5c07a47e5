"""`HeadScores`: how much each attention head matters, and by which method this was found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import read_json, write_json
from .head_set import HeadSet


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

    Raises:
        `ValueError`: if `values` is not a two-dimensional table or holds an infinity.
    """

    values: torch.Tensor
    method: str
    seed: int | None = None
    n_samples: int | None = None
    model_id: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.values).detach().to("cpu", torch.float64)
        if values.dim() != 2 or values.isinf().any():
            raise ValueError(
                f"`values` must be a finite table of shape (layers, heads), got shape {tuple(values.shape)}"
                f"{' with infinities' if values.isinf().any() else ''}."
            )
        object.__setattr__(self, "values", values)

    @property
    def n_heads(self) -> int:
        """The number of heads that have a score."""
        return int((~self.values.isnan()).sum())

    def top(self, ratio: float = 0.1, *, per_layer: int | None = None) -> HeadSet:
        """
        The heads with the highest scores.

        Args:
            ratio (`float`, *optional*, defaults to 0.1):
                Share of all heads to take, in (0, 1]; rounded, and at least one head. The paper takes 10 %.
            per_layer (`int`, *optional*):
                Take at most so many heads of one layer, which spreads the choice over the depth. By default the
                ranking is global, as in the paper.

        Raises:
            `ValueError`: if `ratio` is not in (0, 1], or `per_layer` leaves fewer heads than `ratio` asks for.
        """
        if not 0 < ratio <= 1:
            raise ValueError(f"`ratio` must be in (0, 1], got {ratio}.")
        if per_layer is not None and per_layer < 1:
            raise ValueError(f"`per_layer` must be at least 1, got {per_layer}.")
        count = max(1, round(ratio * self.n_heads))
        # ties are broken by layer, then by head: a stable sort of a list in that order
        ranked = sorted(
            ((layer, head) for layer, head in (~self.values.isnan()).nonzero().tolist()),
            key=lambda pair: -float(self.values[pair]),
        )
        chosen: list[tuple[int, int]] = []
        used: dict[int, int] = {}
        for layer, head in ranked:
            if len(chosen) < count and used.get(layer, 0) < (per_layer or math.inf):
                chosen.append((layer, head))
                used[layer] = used.get(layer, 0) + 1
        if len(chosen) < count:
            raise ValueError(
                f"`per_layer`={per_layer} leaves {len(chosen)} heads, but `ratio`={ratio} asks for {count} of "
                f"{self.n_heads}; raise `per_layer` or lower `ratio`."
            )
        return HeadSet(chosen)

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain JSON types; [`HeadScores.from_dict`] reads them back."""
        rows = [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()]
        return {"format": _FORMAT, **asdict(self), "values": rows}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadScores:
        """
        Read what [`HeadScores.to_dict`] wrote.

        Raises:
            `ValueError`: if `data` is not a table of head scores.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f"`data` is not a table of head scores: expected a mapping with 'format': '{_FORMAT}'.")
        fields = {key: value for key, value in data.items() if key != "format"}
        rows = [[math.nan if value is None else value for value in row] for row in fields.pop("values")]
        return cls(values=torch.tensor(rows, dtype=torch.float64), **fields)

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON to the file `path`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read scores from a JSON file that [`HeadScores.save`] wrote."""
        return cls.from_dict(read_json(path))

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
            raise ImportError("`HeadScores.plot` needs matplotlib: `pip install p2d_peft[plots]`.") from error
        n_layers, n_heads = self.values.shape
        if ax is None:
            _, ax = pyplot.subplots(figsize=(2 + 0.35 * n_heads, 1.5 + 0.25 * n_layers), layout="constrained")
        image = ax.imshow(self.values.numpy(), aspect="auto", cmap="viridis")
        ax.figure.colorbar(image, ax=ax, label=f"{self.method} score")
        ax.set(xlabel="head", ylabel="layer", title=self.model_id or "")
        ax.set_xticks(range(n_heads))
        ax.set_yticks(range(n_layers))
        for layer, head in heads or ():
            ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
        return ax
