"""What `localize.py` found, from the files that its arms wrote. It runs nothing: `python localize.py --report`."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from p2d_peft import HeadScores
from p2d_peft.files import read_json
from p2d_peft.heads import comparison


# in the output folder
SETTINGS, ARMS, SCORES, BASE, FULL_STEP = "settings.json", "arms", "scores", "base", "full_step"
# what the scores by which stability is told were made with, where no arm says it
STABILITY = "stability.json"
# random heads, evenly over the depth: what a method has to beat
CONTROL = ("random", "spread")
RESAMPLES = 10_000
# fewer pairs than these say no more of how much they vary than the smallest and the largest of them
LEAST_PAIRS = 6

# by targets and seeds, in how many per cent of cases the interval over their pairs holds the truth; simulated in the tests
COVERAGE = {(1, 6): 85, (1, 12): 91, (4, 3): 74}
FEW_PAIRS = (
    f"Over so few pairs such an interval holds the truth in less than 95 % of cases: over 6 in about {COVERAGE[1, 6]} %, over 12 "
    f"in about {COVERAGE[1, 12]} %, and over three seeds of each of four targets that differ as much as their seeds do in about "
    f"{COVERAGE[4, 3]} %."
)

Row = dict[str, Any]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def paired(differences: list[float]) -> Row:
    """
    Mean of paired differences, with `low` and `high`: of `LEAST_PAIRS` and more the 95 % interval of the percentile bootstrap
    over the pairs, of fewer the smallest and the largest pair (`bounds` says which), of one nothing.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    result: Row = {"pairs": len(values), "mean": float(values.mean()), "low": None, "high": None, "bounds": None}
    if len(values) >= LEAST_PAIRS:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        result["low"], result["high"] = interval(values[drawn].mean(dim=1))
        result["bounds"] = "95 % interval"
    elif len(values) > 1:
        result["low"], result["high"] = float(values.min()), float(values.max())
        result["bounds"] = "smallest and largest pair"
    return result


def interval(resampled: torch.Tensor) -> list[float]:
    """What 95 % of the resampled means lie between."""
    found: list[float] = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return found


def difference_text(difference: Row, digits: int) -> str:
    """The mean of paired differences, and what stands for how sure it is; see [`paired`]."""
    text = f"{difference['mean']:+.{digits}f}"
    if difference["low"] is None:
        return text
    pairs = "pairs: " * (difference["pairs"] < LEAST_PAIRS)
    return f"{text} ({pairs}{difference['low']:+.{digits}f} to {difference['high']:+.{digits}f})"


def spearman(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Rank correlation over the entries that both have; None where all entries of one are the same."""
    both = ~(a.isnan() | b.isnan())
    correlation = comparison.spearman(a[both], b[both])
    return None if correlation != correlation else correlation


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order in which they come first; they need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def summarize(folder: Path, times: bool = True) -> Row:
    """Everything that the report says, as plain JSON types; without `times` nothing about seconds."""
    names = tuple(name for name in MEANS if times or name not in TIMES)
    arms = [read_json(path) for path in sorted((folder / ARMS).glob("*.json"))]
    runs = arms + [read_json(path) for path in [folder / STABILITY] if path.exists()]
    tasks = sorted({arm["task"] for arm in arms})
    pairs = {(*_setting(arm), arm["method"], arm["choice"]): arm for arm in arms}
    methods = []
    for (ratio, choice, method, lr), group in _groups(arms, "ratio", "choice", "method", "lr").items():
        controls = [(arm, pairs[key]) for arm in group if (key := (*_setting(arm), *CONTROL)) in pairs]
        row = {
            **{"ratio": ratio, "choice": choice, "method": method, "lr": lr, "arms": len(group)},
            **{name: mean(arm[name] for arm in group) for name in names},
            "tasks": {
                task: {"arms": len(of_task), **{name: mean(arm[name] for arm in of_task) for name in names}}
                for task in tasks
                if (of_task := [arm for arm in group if arm["task"] == task])
            },
        }
        if controls and (method, choice) != CONTROL:
            for name in ("nll", "exact_match"):
                row[f"{name}_minus_control"] = paired([arm[name] - control[name] for arm, control in controls])
        methods.append(row)
    methods.sort(key=lambda row: (-row["ratio"], row["lr"], row["choice"], row["nll"]))
    return {
        "settings": read_json(folder / SETTINGS),
        "commands": distinct(run["command"] for run in runs),
        "environments": distinct({"machine": run["machine"], "versions": run["versions"]} for run in runs),
        "seeds": sorted({arm["seed"] for arm in arms}),
        "control": dict(zip(("method", "choice"), CONTROL, strict=True)),
        "base": [read_json(path) for path in sorted((folder / BASE).glob("*.json"))],
        "methods": methods,
        "stability": stability(folder),
    }


TIMES = ("localize_full_steps", "localize_seconds", "train_seconds", "evaluate_seconds")
MEANS = ("nll", "exact_match", *TIMES, "trainable_parameters")


def _setting(arm: Row) -> tuple:
    """What the arms of a pair have in common."""
    return arm["task"], arm["seed"], arm["ratio"], arm["lr"]


def stability(folder: Path) -> Row:
    """
    Spearman correlations of the scores of one method and task, each the mean over its pairs of scores:

    - `between_seeds`: of the same number of samples;
    - `with_most_samples`: of fewer samples with the most, of the same seed, which hold the fewer among them;
    - `with_trained`: with the method `trained`, of the same seed and number of samples.
    """
    scores = []
    for path in sorted((folder / SCORES).glob("*.json")):
        # "<task>-<method>-n<samples>-seed<seed>"; the scores' own seed and number of samples are of the library
        task, method, samples, seed = path.stem.rsplit("-", 3)
        values = HeadScores.load(path).values
        scores.append(
            {
                "task": task,
                "method": method,
                "samples": int(samples.removeprefix("n")),
                "seed": int(seed.removeprefix("seed")),
                "values": values,
            }
        )

    def compared(keys: tuple[str, ...], with_whom: Callable[[list[Row]], Iterable[tuple[Row, Row]]]) -> list[Row]:
        found: dict[tuple, list[float | None]] = defaultdict(list)
        for group in _groups(scores, *keys).values():
            for a, b in with_whom(group):
                found[a["method"], a["task"], a["samples"]].append(spearman(a["values"], b["values"]))
        rows = []
        for (method, task, samples), values in sorted(found.items()):
            known = [value for value in values if value is not None]
            rows.append({"method": method, "task": task, "samples": samples, "pairs": len(known)})
            rows[-1]["spearman"] = mean(known) if known else None
        return rows

    def most(group: list[Row]) -> Iterable[tuple[Row, Row]]:
        last = max(group, key=lambda row: row["samples"])
        return [(row, last) for row in group if row is not last]

    def trained(group: list[Row]) -> Iterable[tuple[Row, Row]]:
        return [(a, b) for a in group for b in group if b["method"] == "trained" and a is not b]

    return {
        "between_seeds": compared(("method", "task", "samples"), lambda group: itertools.combinations(group, 2)),
        "with_most_samples": compared(("method", "task", "seed"), most),
        "with_trained": compared(("task", "seed", "samples"), trained),
    }


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def _difference(difference: Row | None, digits: int) -> str:
    return "" if difference is None else difference_text(difference, digits)


def _times(row: Row) -> list[str]:
    digits = {"localize_full_steps": 2, "localize_seconds": 1, "train_seconds": 1}
    return [f"{row[name]:.{n}f}" for name, n in digits.items()]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(summary: Row) -> str:
    """The report's tables."""
    tasks = sorted({task for row in summary["methods"] for task in row["tasks"]})
    times = any("localize_seconds" in row for row in summary["methods"])
    lines = [
        "NLL and exact match are means over tasks and seeds. Differences are to random heads spread over the layers, of "
        f"the same task and seed: of fewer than {LEAST_PAIRS} pairs with the smallest and the largest, else with the 95 % interval "
        f"of a bootstrap over the pairs. {FEW_PAIRS}"
        + " Full steps: what the localization costs, in full fine-tuning on the same tokens."
        * times,
        "",
    ]
    if summary["base"]:
        lines += ["### The model as it is", ""]
        lines += _table(
            ["task", "NLL", "exact match"],
            ([row["task"], f"{row['nll']:.4f}", f"{row['exact_match']:.3f}"] for row in summary["base"]),
        )
    for (ratio, lr, choice), rows in _groups(summary["methods"], "ratio", "lr", "choice").items():
        lines += [f"### {ratio:.0%} of the heads, {choice}, learning rate {lr:g}", ""]
        lines += _table(
            ["method", "arms", "NLL", "minus control", "exact match", "minus control"]
            + ["full steps", "localize s", "train s"] * times
            + ["weights", *(f"{task} NLL / exact" for task in tasks)],
            (
                [
                    row["method"],
                    str(row["arms"]),
                    f"{row['nll']:.4f}",
                    _difference(row.get("nll_minus_control"), 4),
                    f"{row['exact_match']:.3f}",
                    _difference(row.get("exact_match_minus_control"), 3),
                    *(_times(row) if times else ()),
                    f"{row['trainable_parameters']:,.0f}",
                    *(
                        f"{of_task['nll']:.4f} / {of_task['exact_match']:.3f}"
                        if (of_task := row["tasks"].get(task))
                        else ""
                        for task in tasks
                    ),
                ]
                for row in rows
            ),
        )
    titles = {
        "between_seeds": "Spearman correlation of the scores between seeds",
        "with_most_samples": "Spearman correlation of the scores with those of the most samples",
        "with_trained": "Spearman correlation of the scores with those of `trained`",
    }
    for name, title in titles.items():
        rows = summary["stability"][name]
        if not rows:
            continue
        stable_tasks = sorted({row["task"] for row in rows})
        lines += [f"### {title}", ""]
        lines += _table(
            ["method", "samples", *stable_tasks],
            (
                [method, str(samples)]
                + [_number(next((r["spearman"] for r in group if r["task"] == task), None)) for task in stable_tasks]
                for (method, samples), group in _groups(rows, "method", "samples").items()
            ),
        )
    return "\n".join(lines)
