"""The picture of which heads were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import replacing
from ..heads import HeadScores, HeadSet, ModelGeometry


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_head_map(path: str | Path, heads: HeadSet, geometry: ModelGeometry, scores: HeadScores | None = None) -> None:
    """
    Save a picture (PNG) of a model's heads, layers downwards, in which the chosen ones stand out: framed in the table of
    their scores or, without scores, dark among pale ones.

    Args:
        path (`str` or `Path`): The file to write.
        heads ([`HeadSet`]): The chosen heads.
        geometry ([`ModelGeometry`]): All heads.
        scores ([`HeadScores`], *optional*): The scores of all heads, if they were chosen by scores.

    Raises:
        `ImportError`: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture of the heads needs matplotlib: `pip install 'p2d_peft[plots]'`.") from error
    n_layers, n_heads = geometry.shape
    # no pyplot: it would choose a backend, and keep the figure, for the whole process
    figure = Figure(figsize=(2 + 0.35 * n_heads, 1.5 + 0.25 * n_layers), layout="constrained")
    axes = figure.subplots()
    if scores is not None:
        scores.plot(heads, ax=axes)
    else:
        _plot_choice(heads, geometry, axes)
    with replacing(path) as temporary:
        # without matplotlib's own version in it, the same heads give the same file
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _plot_choice(heads: HeadSet, geometry: ModelGeometry, axes: Axes) -> None:
    chosen_LH = torch.full(geometry.shape, torch.nan)
    for row, layer in enumerate(geometry.rows):
        if layer in geometry:
            for head in range(geometry[layer].n_heads):
                chosen_LH[row, head] = (layer, head) in heads
    axes.imshow(chosen_LH.numpy(), aspect="auto", cmap="Blues", vmin=-0.3, vmax=1)
    axes.set(xlabel="head", ylabel="layer", title="chosen heads")
    axes.set_xticks(range(geometry.shape[1]))
    axes.set_yticks(range(len(geometry.rows)), labels=[str(layer) for layer in geometry.rows])
