"""The pictures of `docs/results.md`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from localize import CHOICES

from p2d_peft import P2DConfig
from p2d_peft.files import read_json, replacing
from p2d_peft.heads import HeadScores

from .choose import HEADS
from .claims import EPOCHS, P2D
from .profile import split_ratio
from .summary import Evidence


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("localize", "select", "train")


def save_plots(evidence: Evidence, results: Path, folder: Path) -> list[str]:
    """Save those pictures that there is something for, as SVG; the names of the files."""
    plots = {
        "aer.svg": _aer(evidence),
        "stages.svg": _stages(evidence),
        "ratios.svg": _ratios(evidence),
        "heads.svg": _heads(evidence, results),
    }
    made = []
    for name, figure in plots.items():
        if figure is not None:
            _save(figure, folder / name)
            made.append(name)
    return made


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    # the same numbers give the same file: no random ids and no date in it
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}), replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, facecolor="white")


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _aer(evidence: Evidence) -> Figure | None:
    """Cost against accuracy, as in the paper's Figure 1; a panel for each target."""
    lines = [line for line in evidence.lines.values() if line.setting == "mixed" and evidence.aer(line)]
    targets = sorted({line.target for line in lines})
    if not targets:
        return None
    figure = _new(5 * len(targets), 4.2)
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        for line in (line for line in lines if line.target == target):
            x, y = evidence.aer(line), 100 * line.mean("exact_match")
            ours = (line.data, line.parameters) == P2D
            axes.scatter(x, y, color="#c2410c" if ours else "#475569", s=60 if ours else 28, zorder=3)
            label = f"{line.data}\n{line.parameters}"
            axes.annotate(label, (x, y), xytext=(5, -4), textcoords="offset points", fontsize=6)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)
        axes.set(title=target, xlabel="AER, the whole cost over full fine-tuning's", ylabel="exact match, %")
    return figure


def _stages(evidence: Evidence) -> Figure | None:
    """Seconds by stage, of P2D and of the reference on the same machine."""
    lines = (evidence.lines.get(("mixed", target, *P2D, EPOCHS)) for target in evidence.targets)
    measured = [(line, reference) for line in lines if line is not None and (reference := evidence.measure(line))]
    if not measured:
        return None
    figure = _new(7, 1.2 + 0.6 * (len(measured) + 1))
    axes = figure.subplots()
    for number, (line, _) in enumerate(measured):
        left = 0.0
        for stage, color in zip(STAGES, ("#0f766e", "#2563eb", "#c2410c"), strict=True):
            seconds = line.seconds(stage)
            axes.barh(f"P2D, {line.target}", seconds, left=left, color=color, label=None if number else stage)
            left += seconds
    _, reference = measured[0]
    axes.barh("full fine-tuning, all rows", reference.seconds("train"), color="#94a3b8", label="reference")
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(fontsize=8)
    return figure


def _ratios(evidence: Evidence) -> Figure | None:
    """Exact match over the share of the heads and over the share of the rows, around P2D's."""
    found: dict[str, dict[str, dict[float, float]]] = {"heads": {}, "rows": {}}
    for line in evidence.lines.values():
        if line.setting != "mixed" or line.epochs != EPOCHS:
            continue
        (data, data_ratio), (parameters, head_ratio) = split_ratio(line.data), split_ratio(line.parameters)
        if data == "full":
            data, data_ratio = P2D[0], 1.0
        if parameters == "heads:all":
            parameters, head_ratio = P2D[1], 1.0
        if (data, parameters) != P2D:
            continue
        value = 100 * line.mean("exact_match")
        if data_ratio == 0.1:
            found["heads"].setdefault(line.target, {})[head_ratio] = value
        if head_ratio == 0.1:
            found["rows"].setdefault(line.target, {})[data_ratio] = value
    # a target of which no other share was tried has a point alone, which shows nothing
    curves = {
        what: {target: values for target, values in sorted(of.items()) if len(values) > 1}
        for what, of in found.items()
    }
    if not any(curves.values()):
        return None
    figure = _new(9, 3.6)
    for axes, (what, of_targets) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        axes.set_xscale("log")
        for target, values in of_targets.items():
            ratios = sorted(values)
            axes.plot([100 * ratio for ratio in ratios], [values[ratio] for ratio in ratios], "o-", label=target)
        shares = sorted({100 * ratio for values in of_targets.values() for ratio in values})
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set(xlabel=f"{what}, %", ylabel="exact match, %")
        if of_targets:
            axes.legend(fontsize=7)
    return figure


def _heads(evidence: Evidence, results: Path) -> Figure | None:
    """The maps of the targets' heads, those of the first seed."""
    files = [results / HEADS / f"{target}-proxy-seed0.json" for target in evidence.targets]
    files = [path for path in files if path.exists()]
    if not files:
        return None
    figure = _new(3.4 * len(files), 6.5)
    for axes, path in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        scores = HeadScores.from_dict(read_json(path)["scores"])
        scores.plot(CHOICES["late"](scores, P2DConfig.head_ratio), ax=axes)
        axes.set_title(path.stem.partition("-")[0], fontsize=9)
    return figure
