"""What is to be run: arms, declared in a YAML file."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from localize import CHOICES

from p2d_peft.heads.localize import LocalizeMethod
from p2d_peft.selection.selector import ScorerName, has_features, needs_heads, needs_target, scores_per_target

from .bigbench import POOLS


SETTINGS = ("mixed", "own", "corrupted", "absent")
# the target of what is trained without one, and tested on all: it costs one training for all of them
ANY = "any"
# of every model, beside the heads that a method finds
ALL_HEADS = "all"
_WITHOUT_TARGET = (None, "random", "magnitude", ALL_HEADS)
METHODS = (*get_args(LocalizeMethod), ALL_HEADS)
# by what stands in a row's name, the share of the layers, counted from the first one, whose heads score
PARTS = {"first": 0.33, "fifth": 0.2}
# the scorers by whose features rows can be told to be alike
WITH_FEATURES = tuple(filter(has_features, get_args(ScorerName)))
_SAMPLES = re.compile(r"from(\d+)")
# `heads-qo` leaves out the keys and values that a group of heads shares
OF_HEADS = ("heads", "heads-qo")
ADAPTERS = ("full", "lora-attention", "lora-all", "shira", *OF_HEADS)


@dataclass(frozen=True)
class Data:
    """
    The rows to train on.

    Args:
        scorer (`str`): `"full"`, or what scores them.
        heads (`str`, *optional*): By which heads it does, for scorers that look at heads.
        part (`str`, *optional*): One of `PARTS`, where these are heads of the first layers only, so that `affinity` runs
            no more than that part of the model.
        robin (`bool`): Whether the target's samples take turns in picking rows, as P2DTrainer has it by default; else the
            best scores are kept.
        diverse (`bool`): Whether rows are picked against their likeness to those before them, of the best four times as many.
        samples (`int`, *optional*): How many samples of the task rows are scored by, where not by the problem's `target_rows`.
        ratio (`float`): The share of the pool that is kept.
    """

    scorer: str
    heads: str | None = None
    part: str | None = None
    robin: bool = False
    diverse: bool = False
    samples: int | None = None
    ratio: float = 0.1

    @classmethod
    def read(cls, text: str) -> Data:
        """From `full`, or `SCORER[:HEADS][/PART][/robin][/diverse][/fromSAMPLES][@RATIO]`; the ratio is a tenth where there is none."""
        name, ratio = split_ratio(text)
        start, *options = name.split("/")
        scorer, _, heads = start.partition(":")
        if scorer == "full":
            made = cls("full", ratio=1.0)
        elif scorer not in get_args(ScorerName):
            raise ValueError(f"data '{text}': '{scorer}' is neither 'full' nor one of {list(get_args(ScorerName))}.")
        else:
            part = next((part for part in PARTS if part in options), None)
            samples = next((int(found[1]) for found in map(_SAMPLES.fullmatch, options) if found), None)
            made = cls(scorer, heads or None, part, "robin" in options, "diverse" in options, samples, ratio)
            fits = needs_heads(scorer) == bool(heads) and (not heads or heads in METHODS)  # type: ignore[arg-type]
            fits = fits and (bool(heads) or not made.part)
            fits = fits and (scores_per_target(scorer) or not made.robin)  # type: ignore[arg-type]
            fits = fits and (scorer in WITH_FEATURES or not made.diverse)
            fits = fits and (needs_target(scorer) or samples is None)  # type: ignore[arg-type]
            if not fits or str(made) != text:
                raise ValueError(
                    f"data '{text}': write SCORER[:HEADS][/PART][/robin][/diverse][/fromSAMPLES][@RATIO], with HEADS of "
                    f"{list(METHODS)} and PART of {list(PARTS)} for scorers with heads, /robin for those that compare with the "
                    f"target's samples, /diverse for {list(WITH_FEATURES)}, and /fromSAMPLES for those that look at samples."
                )
        return made

    def __str__(self) -> str:
        if self.scorer == "full":
            return "full"
        heads = f":{self.heads}" if self.heads else ""
        part = f"/{self.part}" if self.part else ""
        policies = "/robin" * self.robin + "/diverse" * self.diverse
        samples = f"/from{self.samples}" if self.samples else ""
        return f"{self.scorer}{heads}{part}{policies}{samples}{_suffix(self.ratio)}"


@dataclass(frozen=True)
class Parameters:
    """
    The weights to train.

    Args:
        adapter (`str`): One of `ADAPTERS`.
        method (`str`, *optional*): Of `OF_HEADS`, what finds the heads.
        choice (`str`): Of these, how heads are chosen by their scores, one of `localize.CHOICES`.
        ratio (`float`): Of these, the share of the heads.
    """

    adapter: str
    method: str | None = None
    choice: str = "spread"
    ratio: float = 0.1

    @classmethod
    def read(cls, text: str) -> Parameters:
        """From `full`, `lora-attention`, ..., or `heads:METHOD[/CHOICE][@RATIO]`, or with `heads-qo`."""
        name, ratio = split_ratio(text)
        adapter, _, rest = name.partition(":")
        method, _, choice = rest.partition("/")
        if adapter not in ADAPTERS:
            raise ValueError(f"parameters '{text}': '{adapter}' is not one of {list(ADAPTERS)}.")
        if adapter not in OF_HEADS:
            if rest or "@" in text:
                raise ValueError(f"parameters '{text}': '{adapter}' takes neither a method nor a ratio.")
            return cls(adapter)
        if method not in METHODS or (choice or "spread") not in CHOICES:
            raise ValueError(
                f"parameters '{text}': write heads:METHOD[/CHOICE][@RATIO], with a METHOD of {list(METHODS)} and a "
                f"CHOICE of {list(CHOICES)}."
            )
        return cls(adapter, method, choice or "spread", ratio)

    def __str__(self) -> str:
        if self.adapter not in OF_HEADS:
            return self.adapter
        choice = "" if self.choice == "spread" else f"/{self.choice}"
        return f"{self.adapter}:{self.method}{choice}{_suffix(self.ratio)}"


def split_ratio(text: str) -> tuple[str, float]:
    """What stands before `@RATIO`, and the ratio, which is a tenth where there is none."""
    name, at, ratio = text.partition("@")
    try:
        value = float(ratio) if at else 0.1
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"'{text}': the ratio behind '@' must be in (0, 1].")
    return name, value


def _suffix(ratio: float) -> str:
    return "" if ratio == 0.1 else f"@{ratio:g}"


@dataclass(frozen=True)
class Cell:
    """
    What is compared: one cell of the tables, to be run with several seeds and learning rates.

    Args:
        setting (`str`): One of `SETTINGS`.
        target (`str`): The task that heads and rows are chosen for, and that is tested; or `ANY`.
        data ([`Data`]), parameters ([`Parameters`]): What is trained on what.
        epochs (`int`): Passes over the chosen rows.
    """

    setting: str
    target: str
    data: Data
    parameters: Parameters
    epochs: int

    def __post_init__(self) -> None:
        chosen = self.data.scorer not in ("full", "random") or self.parameters.method not in _WITHOUT_TARGET
        if self.target == ANY and (chosen or self.setting not in ("mixed", "corrupted")):
            raise ValueError(f"'{self}' depends on a target; name it.")

    def __str__(self) -> str:
        return f"{self.setting} {self.target} {self.data} {self.parameters} {self.epochs} epochs"


@dataclass(frozen=True)
class Arm:
    """One training: a cell, a seed and a learning rate."""

    cell: Cell
    seed: int
    lr: float

    @property
    def file(self) -> str:
        """The name of its result file."""
        name = "-".join(map(str, (self.cell.setting, self.cell.target, self.cell.data, self.cell.parameters)))
        name = name.replace(":", ".").replace("/", "_")
        return f"{name}-epochs{self.cell.epochs}-lr{self.lr:g}-seed{self.seed}.json"


@dataclass(frozen=True)
class Problem:
    """
    The sizes of a problem.

    Args:
        pool_rows (`int`): Rows of each task in a mixed pool.
        own_rows (`int`): Rows of the pool in the setting `own`, all of the target's task.
        target_rows (`int`): Samples of the task to localize and score by; in no pool.
        validation_rows (`int`): Held-out rows to choose the learning rate by.
        test_rows (`int`): Held-out rows of the target.
        passages (`int`): Unrelated texts, to see what is forgotten.
        option_rows (`int`): Test rows of which the likelihoods of all options are compared.
        wrong (`float`): Share of wrong answers in the setting `corrupted`.
    """

    pool_rows: int = 100
    own_rows: int = 500
    target_rows: int = 40
    validation_rows: int = 50
    test_rows: int = 100
    passages: int = 30
    option_rows: int = 30
    wrong: float = 0.3


@dataclass(frozen=True)
class Source:
    """
    A task's rows in a dataset, on the Hub or in a folder that `datasets.load_dataset` reads.

    Args:
        path (`str`): The dataset's Hub id.
        prompt (`str`): The column of the questions; with `input`, what is put between it and the answer.
        completion (`str`): The column of the answers.
        name (`str`, *optional*): The dataset's configuration.
        split (`str`): Which rows.
        input (`str`, *optional*): A second column of the question.
        instruction (`str`): What to put before each question.
    """

    path: str
    prompt: str
    completion: str
    name: str | None = None
    split: str = "train"
    input: str | None = None
    instruction: str = ""


@dataclass(frozen=True)
class Training:
    """
    How all arms train.

    Args:
        batch_size (`int`): Rows a step, on each process.
        gradient_accumulation_steps (`int`): Batches a step.
        max_length (`int`): Tokens at which a row is cut.
        max_tokens_of_passage (`int`): The same of a passage.
        dtype (`str`): `"bfloat16"` (autocast), `"float32"`, or `"auto"`: what this machine is faster in.
        model_dtype (`str`): What the weights are in.
        activation_checkpointing (`bool`): Whether to keep memory for time, in all arms.
    """

    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    max_tokens_of_passage: int = 128
    dtype: str = "auto"
    model_dtype: str = "float32"
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Profile:
    """
    A file of arms.

    Args:
        model (`str`): The model's Hub id.
        tasks (`dict[str, Source]` or `str`): The tasks, or which eight of BIG-bench, of `bigbench.POOLS`; the first eight by default.
        problem ([`Problem`]), training ([`Training`]): What is the same for all arms.
        learning_rates (`dict[str, list[float]]`): By adapter, those to try.
        seeds (`list[int]`): The seeds; with the first one, all learning rates are tried.
        groups (`list[tuple[list[Cell], list[int]]]`): Cells and the seeds that they are run with.
    """

    model: str
    tasks: dict[str, Source] | str
    problem: Problem
    training: Training
    learning_rates: dict[str, list[float]]
    seeds: list[int]
    groups: list[tuple[list[Cell], list[int]]]

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """
        Read and check a profile.

        Raises:
            `ValueError`: if it names what there is not, or lacks learning rates for what it trains.
        """
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        _check_keys("the profile", content, {field.name for field in fields(cls)} - {"groups"} | {"arms"})
        seeds = content["seeds"]
        groups = [_cells(arms, seeds) for arms in content["arms"]]
        profile = cls(
            model=content["model"],
            tasks=_tasks(content.get("tasks", "bigbench")),
            problem=Problem(**_checked(Problem, content.get("problem", {}))),
            training=Training(**_checked(Training, content.get("training", {}))),
            learning_rates={name: [float(lr) for lr in rates] for name, rates in content["learning_rates"].items()},
            seeds=seeds,
            groups=groups,
        )
        for adapter in sorted({cell.parameters.adapter for cells, _ in groups for cell in cells}):
            if not profile.learning_rates.get(adapter):
                raise ValueError(f"{path}: `learning_rates` has none for '{adapter}'.")
        return profile

    def cells(self) -> dict[Cell, list[int]]:
        """Each cell once, with all seeds that it is to be run with, the first one being that of the learning rate."""
        found: dict[Cell, list[int]] = {}
        for cells, seeds in self.groups:
            for cell in cells:
                found[cell] = sorted({*found.get(cell, []), *seeds, self.seeds[0]}, key=self.seeds.index)
        return found

    def only(self, texts: list[str]) -> Profile:
        """
        The part of it whose cells' names have one of these texts in them.

        Raises:
            `ValueError`: if a text is in none.
        """
        names = {cell: str(cell) for cell in self.cells()}
        if missing := [text for text in texts if not any(text in name for name in names.values())]:
            raise ValueError(f"{missing} is in none of the cells' names, such as '{next(iter(names.values()))}'.")
        groups = [
            ([cell for cell in cells if any(text in names[cell] for text in texts)], seeds)
            for cells, seeds in self.groups
        ]
        return dataclasses.replace(self, groups=groups)

    def targets(self) -> list[str]:
        """All tasks that are a target somewhere."""
        return sorted({cell.target for cells, _ in self.groups for cell in cells} - {ANY})

    def rates(self, cell: Cell) -> list[float]:
        """The learning rates to try for a cell."""
        return self.learning_rates[cell.parameters.adapter]


def _cells(arms: dict[str, Any], seeds: list[int]) -> tuple[list[Cell], list[int]]:
    _check_keys("arms", arms, {"settings", "targets", "data", "parameters", "epochs", "seeds"})
    if unknown := set(arms["settings"]) - set(SETTINGS):
        raise ValueError(f"`settings` {sorted(unknown)} are not of {list(SETTINGS)}.")
    chosen = arms.get("seeds", seeds)
    if unknown_seeds := set(chosen) - set(seeds):
        raise ValueError(f"`seeds` {sorted(unknown_seeds)} of some arms are not among the profile's {seeds}.")
    grid = itertools.product(arms["settings"], arms["targets"], arms["data"], arms["parameters"], arms["epochs"])
    cells = [
        Cell(setting, target, Data.read(data), Parameters.read(parameters), epochs)
        for setting, target, data, parameters, epochs in grid
    ]
    return cells, chosen


def _tasks(named: dict[str, Any] | str) -> dict[str, Source] | str:
    if isinstance(named, str):
        if named not in POOLS:
            raise ValueError(f"`tasks` '{named}' is not one of {list(POOLS)}; or write what each task is read from.")
        return named
    return {name: Source(**_checked(Source, source)) for name, source in named.items()}


def _checked(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    _check_keys(kind.__name__.lower(), values, {field.name for field in fields(kind)})
    return values


def _check_keys(what: str, values: dict[str, Any], known: set[str]) -> None:
    if unknown := set(values) - known:
        raise ValueError(f"{what}: {sorted(unknown)} are not among {sorted(known)}.")


def first_arms(profile: Profile) -> list[Arm]:
    """The arms of the first seed, each cell with all of its learning rates; those that take longest come first."""
    seed = profile.seeds[0]
    arms = [Arm(cell, seed, lr) for cell in profile.cells() for lr in profile.rates(cell)]
    return sorted(arms, key=_is_short)


def further_arms(profile: Profile, best: Callable[[Cell], float]) -> list[Arm]:
    """
    The arms of the other seeds, seed by seed, so that a run that is stopped leaves balanced results.

    Args:
        profile ([`Profile`]): What is to be run.
        best (`Callable[[Cell], float]`): The rate of a cell that was best with the first seed.
    """
    cells = profile.cells()
    arms = [Arm(cell, seed, best(cell)) for seed in profile.seeds[1:] for cell in cells if seed in cells[cell]]
    return sorted(arms, key=_is_short)


def _is_short(arm: Arm) -> bool:
    return arm.cell.data.ratio < 1
