"""From tasks to a problem: a pool, a target, and held-out rows of which none is in either."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .profile import Cell, Problem


Row = dict[str, Any]
# what stands beside the tasks, by this name
PASSAGES = "passages"


def task_names(tasks: dict[str, list[Row]]) -> list[str]:
    """The tasks, without the passages that stand beside them."""
    return [name for name in tasks if name != PASSAGES]


@dataclass(frozen=True)
class Split:
    """
    The rows of one problem, each with `task`, `prompt`, `completion`, `options` and `right` (whether its answer is).

    Args:
        pool (`list[dict]`): What may be trained on, shuffled.
        target (`list[dict]`): Samples of the task, to localize by. Empty where the target is `ANY`.
        samples (`list[dict]`): Those to score rows by: the same, or as many as the cell asks for, of which some are the same.
        validation (`dict[str, list[dict]]`), test (`dict[str, list[dict]]`): Held out, by task; the same for all seeds.
        passages (`list[str]`): Unrelated texts.
    """

    pool: list[Row]
    target: list[Row]
    samples: list[Row]
    validation: dict[str, list[Row]]
    test: dict[str, list[Row]]
    passages: list[str]


def split(tasks: dict[str, list[Row]], cell: Cell, tested: list[str], sizes: Problem, seed: int) -> Split:
    """
    The problem of a cell. The seed draws the target's samples and the pool.

    Args:
        tasks (`dict[str, list[dict]]`): All rows, by task, and the `passages`.
        cell ([`Cell`]): Of it the setting, the target, and how many samples it scores rows by.
        tested (`list[str]`): The tasks to hold rows of out for the tests.
        sizes ([`Problem`]): How many rows of what.
        seed (`int`): The seed.

    Raises:
        `ValueError`: if there are not so many rows, or a held-out prompt is in the pool or the target.
    """
    names = task_names(tasks)
    if unknown := set(tested) - set(names):
        raise ValueError(f"target {sorted(unknown)} is not one of the tasks {names}.")
    held_out = sizes.test_rows + sizes.validation_rows
    test = {name: tasks[name][: sizes.test_rows] for name in tested}
    validation = {name: tasks[name][sizes.test_rows : held_out] for name in tested}
    of_each: dict[str, list[Row]] = {}
    target: list[Row] = []
    samples: list[Row] = []
    for name in names:
        rows = tasks[name][held_out:]
        rows = random.Random(f"{name} {seed}").sample(rows, len(rows))
        # of every task, so that a pool is the same whatever the target is
        if name == cell.target:
            target = rows[: sizes.target_rows]
            count = cell.data.samples or len(target)
            # more of them come from the far end: the pool is to stay the same
            samples = target[:count] + rows[len(rows) - max(0, count - len(target)) :]
        of_each[name] = rows[sizes.target_rows :]
    wanted = dict.fromkeys(names, sizes.pool_rows)
    if cell.setting == "own":
        wanted = {cell.target: sizes.own_rows}
    elif cell.setting == "absent":
        del wanted[cell.target]
    pool = []
    for name, count in wanted.items():
        if len(of_each[name]) < count:
            raise ValueError(f"task '{name}' has {len(of_each[name])} rows left for the pool, asked for are {count}.")
        rows = [{**row, "right": True} for row in of_each[name][:count]]
        if cell.setting == "corrupted":
            rows = _with_wrong_answers(rows, sizes.wrong, random.Random(f"wrong {name} {seed}"))
        pool += rows
    random.Random(f"pool {seed}").shuffle(pool)
    made = Split(pool, target, samples, validation, test, [row["text"] for row in tasks[PASSAGES][: sizes.passages]])
    _check_apart(made)
    return made


def _with_wrong_answers(rows: list[Row], share: float, generator: random.Random) -> list[Row]:
    """The rows, of which a share got another one's answer, and another answer."""
    made = list(rows)
    for index in generator.sample(range(len(rows)), round(share * len(rows))):
        row = rows[index]
        candidates = row["options"] or [other["completion"].strip() for other in rows]
        others = [answer for answer in candidates if answer != row["completion"].strip()]
        made[index] = {**row, "completion": f" {generator.choice(others)}", "right": False}
    return made


def _check_apart(made: Split) -> None:
    held_out = {row["prompt"] for of_task in (made.test, made.validation) for rows in of_task.values() for row in rows}
    samples = made.target + made.samples
    for name, rows in (("pool", made.pool), ("target", samples)):
        if shared := held_out & {row["prompt"] for row in rows}:
            raise ValueError(f"{len(shared)} held-out prompts are in the {name}, first {sorted(shared)[0]!r}.")
    if {row["prompt"] for row in samples} & {row["prompt"] for row in made.pool}:
        raise ValueError("samples of the target are in the pool.")


def as_dataset(rows: list[Row]) -> Dataset:
    """What a trainer and a selector read of the rows."""
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
