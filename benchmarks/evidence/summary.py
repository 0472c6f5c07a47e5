"""What the arms say together: a line for each cell, and the claims with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from localize_report import RESAMPLES, distinct, interval, paired
from torch.nn import functional

from p2d_peft.files import read_json

from .profile import ANY
from .runner import ARMS, BASE, SETTINGS


Result = dict[str, Any]
# a line of the tables: setting, target, data, parameters, epochs
Key = tuple[str, str, str, str, int]
REFERENCE = ("full", "full")


@dataclass(frozen=True)
class Line:
    """
    A cell's results for one target, with the learning rate that was best on the validation rows, by seed.

    Args:
        results (`dict[int, dict]`): The arms' results, of which `tests` are this target's.
        tests (`dict[int, dict]`): `nll`, `exact_match`, `right` (a digit a row) and, where there are options, the rest.
    """

    setting: str
    target: str
    data: str
    parameters: str
    epochs: int
    lr: float
    results: dict[int, Result]
    tests: dict[int, Result]

    def mean(self, name: str) -> float:
        """Of a number of the tests, over the seeds."""
        return statistics.mean(test[name] for test in self.tests.values())

    def mean_of_arm(self, name: str) -> float:
        """Of a number of the arms, over the seeds."""
        return statistics.mean(result[name] for result in self.results.values())

    @property
    def alone(self) -> bool:
        """
        Whether [`seconds`] are those of an arm alone: not where processes share an accelerator, of whose time each one's
        clock counts the others' share, too. On a CPU a process's own seconds are counted.
        """
        return all(
            result["memory_kind"] == "process" or result.get("processes_per_device", 1) == 1
            for result in self.results.values()
        )

    @property
    def machines(self) -> list[Result]:
        """What its arms, and the finding of their heads and rows, were run on, each once."""
        return distinct(
            machine
            for result in self.results.values()
            # an arm that does not say where they were found was run where they were
            for machine in (result["machine"], *result.get("chosen_on", []))
        )

    def seconds(self, *stages: str) -> float:
        """Over the seeds, the mean of what stages took: the process's own seconds on a CPU, else the clock's."""
        kind = "cpu" if next(iter(self.results.values()))["memory_kind"] == "process" else "wall"
        return statistics.mean(
            sum(result["seconds"][stage][kind] for stage in stages) for result in self.results.values()
        )


def comparable(lines: Iterable[Line]) -> bool:
    """Whether the seconds of lines can be compared: each arm was alone, and all were run on one machine."""
    lines = list(lines)
    return all(line.alone for line in lines) and len(distinct(one for line in lines for one in line.machines)) < 2


@dataclass(frozen=True)
class Evidence:
    """
    All results of a folder.

    Args:
        settings (`dict`): What is the same for all arms.
        base (`dict[str, dict]`): The untrained model's results, by target.
        lines (`dict[Key, Line]`): By setting, target, data, parameters and epochs.
        tried (`list[dict]`): The arms that were validated, one for each learning rate of a cell.
        arms (`int`): How many arms there are.
        provenance (`list[dict]`): The machines and versions of the arms, each once.
        commands (`list[str]`): What the arms were called with, each once.
        again (`Evidence`, *optional*): Some of the arms once more, on another machine.
    """

    settings: Result
    base: dict[str, Result]
    lines: dict[Key, Line]
    tried: list[Result]
    arms: int
    provenance: list[Result]
    commands: list[str]
    again: Evidence | None = None

    @property
    def targets(self) -> list[str]:
        """The targets, in order."""
        return sorted({line.target for line in self.lines.values()})

    def aer(self, line: Line) -> float | None:
        """Seconds of all stages over those of what [`measure`] finds; None where it finds nothing."""
        reference = self.measure(line)
        return reference and line.seconds("localize", "select", "train") / reference.seconds("train")

    def measure(self, line: Line) -> Line | None:
        """
        Full fine-tuning on all of a line's pool for as many epochs, here or `again`; None without such a reference, or where
        the two can't be compared, see [`comparable`].
        """
        references = [self.reference(line)] + ([self.again.reference(line)] if self.again else [])
        return next((other for other in references if other is not None and comparable([line, other])), None)

    def reference(self, line: Line) -> Line | None:
        """Full fine-tuning on all of a line's pool for as many epochs, whichever targets it was tested on."""
        exact = self.lines.get((line.setting, line.target, *REFERENCE, line.epochs))
        if exact is not None:
            return exact
        same_pool = (
            other
            for other in self.lines.values()
            if (other.setting, other.data, other.parameters, other.epochs) == (line.setting, *REFERENCE, line.epochs)
            and all(result["target"] == ANY for result in other.results.values())
        )
        return next(same_pool, None)

    def timed(self, line: Line) -> bool:
        """Whether a line's seconds can be compared with its reference's; without one, with those of the pool's other lines."""
        reference = self.reference(line)
        if reference is not None:
            return comparable([line, reference])
        pool = (line.setting, line.target)
        return comparable(other for other in self.lines.values() if (other.setting, other.target) == pool)

    @property
    def base_passages_nll(self) -> float:
        """The NLL of unrelated texts before any training, in nats a token."""
        nll: float = next(iter(self.base.values()))["passages_nll"]
        return nll

    def forgotten(self, line: Line) -> float:
        """By how much the NLL of unrelated texts is higher than the untrained model's, in nats a token."""
        return line.mean_of_arm("passages_nll") - self.base_passages_nll


def read_evidence(folder: Path) -> Evidence:
    """Everything in a folder that `run_evidence.py run` wrote."""
    results = [read_json(path) for path in sorted((folder / ARMS).glob("*.json"))]
    base = {path.stem: read_json(path) for path in sorted((folder / BASE).glob("*.json"))}
    cells: dict[Key, list[Result]] = {}
    for result in results:
        key = tuple(result[name] for name in ("setting", "target", "data", "parameters", "epochs"))
        cells.setdefault(key, []).append(result)  # type: ignore[arg-type]
    lines: dict[Key, Line] = {}
    for (setting, target, data, parameters, epochs), arms in cells.items():
        lr = _best_rate(arms)
        if lr is None:
            continue
        kept = {arm["seed"]: arm for arm in arms if arm["lr"] == lr}
        for tested in base if target == ANY else [target]:
            tests = {seed: arm["test"][tested] for seed, arm in kept.items() if tested in arm["test"]}
            if tests:
                line = Line(setting, tested, data, parameters, epochs, lr, kept, tests)
                lines[setting, tested, data, parameters, epochs] = line
    provenance = distinct({name: result[name] for name in ("machine", "versions", "threads")} for result in results)
    tried = [result for result in results if result["validation"]]
    commands = list(dict.fromkeys(result["command"] for result in results))
    return Evidence(read_json(folder / SETTINGS), base, lines, tried, len(results), provenance, commands)


def _best_rate(arms: list[Result]) -> float | None:
    """The learning rate with the lowest validation NLL; None as long as no arm has been validated."""
    validated = [arm for arm in arms if arm["validation"]]
    if not validated:
        return None

    def nll(arm: Result) -> float:
        return statistics.mean(of["nll"] for of in arm["validation"].values())

    best: float = min(validated, key=nll)["lr"]
    return best


@dataclass(frozen=True)
class Comparison:
    """
    One side against another, over the targets and seeds that both have.

    Args:
        ours (`tuple[str, str]`), theirs (`tuple[str, str]`): Data and parameters of the sides.
        exact_match (`dict`): Of the difference, ours minus theirs, `mean`, and `low` and `high` of the 95 % interval. What
            is resampled within each target are its seeds and its test rows, which both sides have in common.
        nll (`dict`): The same over pairs of target and seed, see [`localize_report.paired`]. Lower is better.
        of_targets (`dict[str, dict]`): `exact_match` for each target alone.
        pairs (`int`): Pairs of target and seed.
        rates (`dict[str, tuple[float, float]]`): For each target the learning rates of the sides.
    """

    ours: tuple[str, str]
    theirs: tuple[str, str]
    exact_match: Result
    nll: Result
    of_targets: dict[str, Result]
    pairs: int
    rates: dict[str, tuple[float, float]]


def compare(
    evidence: Evidence, ours: tuple[str, str], theirs: tuple[str, str], setting: str = "mixed", epochs: int = 3
) -> Comparison | None:
    """Compare two sides in a setting; None where there is no target and seed that both have."""
    rows: dict[str, torch.Tensor] = {}
    rates: dict[str, tuple[float, float]] = {}
    nll: list[float] = []
    for target in evidence.targets:
        a, b = (evidence.lines.get((setting, target, *side, epochs)) for side in (ours, theirs))
        if a is None or b is None:
            continue
        seeds = sorted(set(a.tests) & set(b.tests))
        if not seeds:
            continue
        nll += [a.tests[seed]["nll"] - b.tests[seed]["nll"] for seed in seeds]
        of_seeds = [_differences(a.tests[seed]["right"], b.tests[seed]["right"]) for seed in seeds]
        rows[target] = torch.tensor(of_seeds, dtype=torch.float64)
        rates[target] = a.lr, b.lr
    if not nll:
        return None
    exact_match, of_targets = _bootstrap_within(rows.values())
    return Comparison(
        ours,
        theirs,
        exact_match=exact_match,
        nll=paired(nll),
        of_targets=dict(zip(rows, of_targets, strict=True)),
        pairs=len(nll),
        rates=rates,
    )


def _differences(ours: str, theirs: str) -> list[int]:
    return [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]


def _bootstrap_within(groups: Iterable[torch.Tensor]) -> tuple[Result, list[Result]]:
    """
    Mean over targets of their means, with the 95 % interval of a bootstrap that resamples the seeds and the test rows of each
    target, whose differences are a row for each seed; and the same of each target alone. The targets are these: nothing is said
    about others.
    """
    generator = torch.Generator().manual_seed(0)
    means, resampled = [], []
    for group in groups:
        means.append(group.mean())
        seeds, rows = (torch.randint(size, (RESAMPLES, size), generator=generator) for size in group.shape)
        # the mean over drawn seeds of each row is made first: all drawn seeds by all drawn rows are many numbers
        weights = functional.one_hot(seeds, len(group)).double().mean(dim=1)
        resampled.append((weights @ group).gather(1, rows).mean(dim=1))
    over_all = _with_interval(torch.stack(means).mean(), torch.stack(resampled).mean(dim=0))
    return over_all, [_with_interval(*of_target) for of_target in zip(means, resampled, strict=True)]


def _with_interval(mean: torch.Tensor, resampled: torch.Tensor) -> Result:
    low, high = interval(resampled)
    return {"mean": float(mean), "low": low, "high": high}
