"""What is to be done in which order, in one process or several: the stages that arms share before the arms."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from threading import Thread
from typing import Any

import torch

from .profile import ALL_HEADS, Arm, Cell, Profile, first_arms, further_arms
from .runner import Runner


# a process's own runner, made once
_of_process: list[Runner] = []


@dataclass(frozen=True)
class Work:
    """
    A call of one of [`Runner`]'s methods.

    Args:
        method (`str`): Its name.
        arguments (`tuple`): What it is called with.
    """

    method: str
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        """Do it in this process."""
        start = time.perf_counter()
        result = getattr(_of_process[0], self.method)(*self.arguments)
        if isinstance(result, dict):
            (arm,) = self.arguments
            numbers = "  ".join(
                f"{name} NLL {found['nll']:.3f} exact {found['exact_match']:.2f}"
                for name, found in result["test"].items()
            )
            print(f"{time.perf_counter() - start:6.0f} s  {arm.file.removesuffix('.json')}  {numbers}", flush=True)


def shared_stages(profile: Profile) -> list[list[Work]]:
    """What arms share, each piece once: the untrained model and the heads' scores, then the rows."""
    heads: dict[tuple[str, str, int], Cell] = {}
    rows: dict[tuple[str, str, str, int], Cell] = {}
    for cell, seeds in profile.cells().items():
        for seed in seeds:
            for method in (cell.data.heads, cell.parameters.method):
                if method not in (None, ALL_HEADS):
                    heads.setdefault((cell.target, method, seed), cell)
            if cell.data.ratio < 1:
                rows.setdefault((cell.setting, cell.target, str(cell.data), seed), cell)
    return [
        [Work("base", (target,)) for target in profile.targets()]
        + [Work("localize", (cell, method, seed)) for (_, method, seed), cell in heads.items()],
        [Work("select", (cell, seed)) for (*_, seed), cell in rows.items()],
    ]


def run_all(profile: Profile, make_runner: Callable[[], Runner], jobs: int) -> None:
    """
    Do what is missing of a profile.

    Args:
        profile ([`Profile`]): What is to be run; all of a runner's own profile, or a part of it.
        make_runner (`Callable[[], Runner]`): Makes a process's runner. With several jobs it must be one to pickle.
        jobs (`int`): Processes. Each takes what is next as soon as it is free.
    """
    here = make_runner()

    def missing(arms: list[Arm]) -> list[Work]:
        return [Work("run", (arm,)) for arm in arms if not here.path(arm).exists()]

    def work(do: Callable[[Iterable[Work]], None]) -> None:
        for stage in shared_stages(profile):
            do(stage)
        do(missing(first_arms(profile)))
        do(missing(further_arms(profile, here.best_rate)))

    if jobs == 1:
        _of_process[:] = [here]
        work(_one_by_one)
        return
    # spawned: a forked process would have the threads' locks, but not the threads
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, context, _start, (make_runner, numbers)) as pool:
        work(lambda pieces: _wait_for([pool.submit(piece) for piece in pieces]))


def _one_by_one(pieces: Iterable[Work]) -> None:
    for piece in pieces:
        piece()


def _wait_for(pieces: list[Future[None]]) -> None:
    """Wait until all is done; where a piece fails, what has not begun is not begun any more."""
    try:
        for piece in pieces:
            piece.result()
    except BaseException:
        for piece in pieces:
            piece.cancel()
        raise


def _start(make_runner: Callable[[], Runner], numbers: SimpleQueue[int]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    if torch.accelerator.is_available():  # one for each process, as far as there are so many
        torch.accelerator.set_device_index(numbers.get() % torch.accelerator.device_count())
    _of_process[:] = [make_runner()]


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: killed, it can't tell the others to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
