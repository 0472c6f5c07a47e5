"""Arms that take turns in one process, and what one takes of another."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any


def time_rounds(arms: dict[str, Callable[[], Any]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    generator = random.Random(seed)
    for _ in range(rounds):
        for name in generator.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
