"""
Draws the picture of the README and of the site's first page from the record of a quickstart's run.

    python scripts/site/picture.py benchmarks/results/quickstart_family.json

What is drawn is that run: its heads, how many rows it kept, its seconds. Which of the rows it kept is not in a record; they
are drawn at random. It writes docs/assets/p2d.svg, and p2d-narrow.svg for phones.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


ASSETS = Path(__file__).parents[2] / "docs" / "assets"

# Colours are variables, which the site sets by its own switch of light and dark; a picture by itself asks the reader's system.
STYLE = """
svg.p2d { --ink: #1f2430; --soft: #5f6778; --idle: #d3d8e2; --heads: #d9480f; --rows: #0b7285; --train: #5f3dc4;
font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg.p2d { --ink: #eceff6; --soft: #a3abbd; --idle: #454c5c; --heads: #ff922b; --rows: #3bc9db;
--train: #b197fc; } }
.p2d .ink { fill: var(--ink); } .p2d .soft { fill: var(--soft); } .p2d .idle { fill: var(--idle); }
.p2d .heads { fill: var(--heads); } .p2d .rows { fill: var(--rows); } .p2d .train { fill: var(--train); }
.p2d.narrow .text { font-size: 13px; } .p2d .title { font-size: 19px; font-weight: 650; } .p2d .text { font-size: 14.5px; } .p2d .arrow { fill: none; stroke: var(--soft); stroke-width: 2; }
"""

PANEL = 240  # the width of each of the three
TOP = 58  # where the drawing in a panel begins
Box = tuple[float, float, float, float]  # x, y, width, height


def boxes(kind: str, drawn: Iterable[Box]) -> str:
    """Rectangles of one colour as one path, which is a tenth of the size of as many elements."""
    path = "".join(f"M{x:.5g} {y:.5g}h{width:.4g}v{height:.4g}h-{width:.4g}z" for x, y, width, height in drawn)
    return f'<path class="{kind}" d="{path}"/>'


def tiles(identity: str, pitch: float, size: float, columns: int, n: int) -> str:
    """The first n cells of a grid, row by row, in the colour of what is not chosen: a pattern, and what is left of a row."""
    rows, rest = divmod(n, columns)
    return (
        f'<pattern id="{identity}" width="{pitch:g}" height="{pitch:g}" patternUnits="userSpaceOnUse">'
        f'<rect class="idle" width="{size:g}" height="{size:g}"/></pattern>'
        f'<rect fill="url(#{identity})" width="{columns * pitch:g}" height="{rows * pitch:g}"/>'
        + boxes("idle", ((column * pitch, rows * pitch, size, size) for column in range(rest)))
    )


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def cells(heads: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Heads as (layer, head)."""
    return sorted((int(layer), head) for layer, of_layer in heads.items() for head in of_layer)


def head_cells(report: dict[str, Any]) -> tuple[list[tuple[int, int]], int, int]:
    """The heads that are trained, the number of layers and that of heads a layer."""
    chosen = cells(report["heads"])
    n_layers = max(layer for layer, _ in chosen) + 1
    return chosen, n_layers, report["n_heads"] // n_layers


def localize(report: dict[str, Any], prefix: str) -> list[str]:
    chosen, n_layers, n_heads = head_cells(report)
    pitch = PANEL / n_layers
    size = pitch - 1.6
    grid = [
        tiles(f"{prefix}-heads", pitch, size, n_layers, report["n_heads"]),
        boxes("rows", ((layer * pitch, head * pitch, size, size) for layer, head in cells(report["scoring_heads"]))),
        boxes("heads", ((layer * pitch, head * pitch, size, size) for layer, head in chosen)),
    ]
    return [
        text("title heads", 0, 16, "1  Localize"),
        text(
            "text soft",
            0,
            40,
            f"{report['n_heads']} heads: {len(cells(report['scoring_heads']))} to score, {len(chosen)} to train",
        ),
        moved(0, TOP, grid),
        text("text soft", 0, TOP + n_heads * pitch + 17, "one column a layer"),
    ]


def select(report: dict[str, Any], prefix: str) -> list[str]:
    n_rows, columns = report["pool_rows"], 61
    pitch = PANEL / columns
    size = pitch - 1.1
    kept = sorted(random.Random(1).sample(range(n_rows), report["selected_rows"]))
    grid = [
        tiles(f"{prefix}-rows", pitch, size, columns, n_rows),
        boxes("rows", ((row % columns * pitch, row // columns * pitch, size, size) for row in kept)),
    ]
    return [
        text("title rows", 0, 16, "2  Select"),
        text("text soft", 0, 40, f"{len(kept)} of {n_rows:,} rows, by their scores"),
        moved(0, TOP, grid),
        text("text soft", 0, TOP + n_rows / columns * pitch + 17, "one dot a row of the pool"),
    ]


def adapt(report: dict[str, Any], prefix: str) -> list[str]:
    chosen, n_layers, n_heads = head_cells(report)
    pitch, attention, rest = PANEL / n_layers, 34, 38
    cell = attention / n_heads
    share = report["trainable_parameters"] / (report["total_parameters"] - report["trainable_parameters"])
    return [
        text("title train", 0, 16, "3  Adapt"),
        text("text soft", 0, 40, f"{share:.1%} of the weights"),
        boxes("idle", ((layer * pitch, TOP, pitch - 1.6, attention + rest) for layer in range(n_layers))),
        boxes("train", ((layer * pitch, TOP + head * cell, pitch - 1.6, cell) for layer, head in chosen)),
        text("text soft", 0, TOP + attention + rest + 17, "on those rows; all else is frozen"),
    ]


def cost(report: dict[str, Any], width: float) -> list[str]:
    """The seconds of the stages and of the reference, to scale."""
    seconds, reference = report["stage_seconds"], report["reference_seconds"]
    drawn, x = [], 0.0
    for stage, kind in (("localize", "heads"), ("select", "rows"), ("train", "train")):
        length = seconds[stage] / reference * width
        drawn.append(boxes(kind, [(x, 26, length, 18)]))
        x += length
    source = "" if report["reference_source"] == "measured" else f", {report['reference_source']}"
    return [
        text("title ink", 0, 14, f"AER {report['aer']:.3f}"),
        *drawn,
        text("text ink", x + 9, 40, f"all three stages: {sum(seconds.values()):.0f} s"),
        boxes("idle", [(0, 50, width, 18)]),
        text("text ink", 9, 64, f"full fine-tuning: {reference:,.0f} s{source}"),
    ]


def moved(x: float, y: float, parts: list[str]) -> str:
    return f'<g transform="translate({x:g} {y:g})">{"".join(parts)}</g>'


def draw(report: dict[str, Any], narrow: bool) -> str:
    """The picture as SVG: its panels side by side, or one below the other."""
    panels: list[Callable[[dict[str, Any], str], list[str]]] = [localize, select, adapt]
    margin, prefix = 6, "narrow" if narrow else "wide"
    if narrow:
        width, step, height = PANEL + 2 * margin, 178, 3 * 178 + 100
        places = [(margin, margin + index * step) for index in range(3)]
        arrows: list[str] = []
        bars = (margin, 3 * step + margin)
    else:
        gap = 62
        width, height = 3 * PANEL + 2 * gap + 2 * margin, 288
        places = [(margin + index * (PANEL + gap), margin) for index in range(3)]
        arrows = [f'<path class="arrow" d="M{x + PANEL + 15:g} 94h30m-9 -8l9 8l-9 8"/>' for x, _ in places[:2]]
        bars = (margin, 200)
    chosen, _, _ = head_cells(report)
    label = (
        f"P2D in one run: of {report['n_heads']} attention heads {len(cells(report['scoring_heads']))} are chosen that select "
        f"{report['selected_rows']} of {report['pool_rows']} rows, and {len(chosen)} that alone are trained on only those rows. "
        f"All of it takes {report['aer']:.3f} of the time of full fine-tuning."
    )
    parts = [
        f'<svg class="p2d {prefix}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>".replace("\n\n", "\n"),
        *(moved(*place, panel(report, prefix)) for place, panel in zip(places, panels, strict=True)),
        *arrows,
        moved(*bars, cost(report, width - 2 * margin)),
        "</svg>\n",
    ]
    return "\n".join(parts)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/site/picture.py RECORD.json")
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["report"]
    for name, narrow in (("p2d.svg", False), ("p2d-narrow.svg", True)):
        (ASSETS / name).write_text(draw(report, narrow), encoding="utf-8")


if __name__ == "__main__":
    main()
