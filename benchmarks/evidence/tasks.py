"""The rows of a profile's tasks: BIG-bench's, or datasets'."""

from __future__ import annotations

import random
from typing import Any

from datasets import load_dataset
from quickstart_data import as_row

from . import bigbench
from .profile import Profile, Source


Row = dict[str, Any]


def load_tasks(profile: Profile, folders: dict[str, str]) -> dict[str, list[Row]]:
    """
    The rows of all tasks, in the form that [`bigbench.fetch`] gives them, with its passages.

    Args:
        profile ([`Profile`]): What names the tasks.
        folders (`dict[str, str]`): For datasets that are not to come from the Hub, the folder of their files.
    """
    if isinstance(profile.tasks, str):
        return bigbench.fetch(profile.tasks)
    tasks = {name: _read(name, source, folders) for name, source in profile.tasks.items()}
    return {**tasks, "passages": bigbench.fetch()["passages"]}


def _read(name: str, source: Source, folders: dict[str, str]) -> list[Row]:
    if source.path in folders:
        dataset = load_dataset(folders[source.path], split=source.split)
    else:
        dataset = load_dataset(source.path, source.name, split=source.split)
    made: dict[str, Row] = {}
    for entry in dataset:
        question = "\n".join(
            text
            for text in (source.instruction, entry[source.prompt], entry[source.input] if source.input else "")
            if text
        )
        row = as_row(name, question, entry[source.completion])
        made.setdefault(row["prompt"], {**row, "options": []})
    rows = list(made.values())
    return random.Random(name).sample(rows, len(rows))
