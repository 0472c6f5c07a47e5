"""
The rows of the comparison: twice eight tasks of BIG-bench, and passages that have nothing to do with them.

They are read from the source distribution of `bigbench` 1.0.0 on PyPI (Apache-2.0, 358 MB), of which nothing is installed
or run. BIG-bench asks that its rows be kept out of training corpora: they go into a cache and never into this repository.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quickstart_data import as_row, default_cache_dir

from p2d_peft.files import read_json, write_json


SDIST = (
    "https://files.pythonhosted.org/packages/95/f8/"
    "c019b3579df548a04cac12342cfcb878e50ddf6cfcd7fddba8cfc721c157/bigbench-1.0.0.tar.gz"
)
SDIST_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASKS_IN_SDIST = "bigbench-1.0.0/bigbench/benchmark_tasks"

# rows kept of each task, after a shuffle with a seed of its own
MOST_ROWS = 1500
PASSAGES = 200

Row = dict[str, Any]
# makes a row of an example, or None, with a generator for what is drawn
MakeRow = Callable[[Row, random.Random], Row | None]


def _choices(question: str, example: Row, order: random.Random) -> Row | None:
    """A question with its options; None where not exactly one is right."""
    options = list(example["target_scores"])
    right = [option for option, score in example["target_scores"].items() if score == 1]
    if len(right) != 1:
        return None
    order.shuffle(options)
    return {**as_row("", f"{question}\nOptions: {' / '.join(options)}", right[0]), "options": options}


def _free(question: str, example: Row, order: random.Random) -> Row | None:
    target = example["target"]
    return {**as_row("", question, target if isinstance(target, str) else target[0]), "options": []}


def _of_choices(before: str = "") -> MakeRow:
    return lambda example, order: _choices(before + example["input"].strip(), example, order)


def _of_text(before: str) -> MakeRow:
    return lambda example, order: _free(before + example["input"].strip(), example, order)


# by a task's name its folder in the distribution, and what makes its rows
Tasks = dict[str, tuple[str, MakeRow]]
TASKS: Tasks = {
    "question_typing": (
        "natural_instructions/subtask046_miscellaenous_question_typing",
        _of_text("Give the type of the answer.\n"),
    ),
    "intent_recognition": ("intent_recognition", _of_choices()),
    "unit_identification": ("unit_conversion/unit_identification", _of_choices()),
    "qasc": ("natural_instructions/subtask041_qasc_answer_generation", _of_text("Answer from the fact.\n")),
    "sentiment": ("multiemo/reviews_sentence_en", _of_choices("Sentiment of this review sentence?\n")),
    "hyperbaton": ("hyperbaton", _of_choices()),
    "social_iqa": ("social_iqa", _of_choices()),
    "strategyqa": ("strategyqa", _of_choices()),
}
# For a second look at defaults that were chosen on the first eight. Two pairs are of one kind, so that a pool has rows that are
# easily taken for the target's.
MORE_TASKS: Tasks = {
    "past_tense": ("linguistic_mappings/past_tense_json", _of_text("Give the past tense.\n")),
    "plural": ("linguistic_mappings/plural_json", _of_text("Give the plural.\n")),
    "goal_inference": ("goal_step_wikihow/goal_inference", _of_choices()),
    "step_inference": ("goal_step_wikihow/step_inference", _of_choices()),
    "colored_objects": ("reasoning_about_colored_objects", _of_choices()),
    "object_counting": ("object_counting", _of_text("")),
    "social_support": ("social_support", _of_choices("Is this reply unsupportive, neutral or supportive?\n")),
    "epistemic_reasoning": ("epistemic_reasoning", _of_choices()),
}
# by the name that a profile has for them, and the number of their file in the cache
POOLS: dict[str, tuple[Tasks, int]] = {"bigbench": (TASKS, 1), "bigbench-2": (MORE_TASKS, 2)}
PASSAGES_IN_SDIST = "natural_instructions/subtask026_drop_question_generation"


def fetch(pool: str = "bigbench", cache_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """
    The rows of eight tasks, and passages of text that are unrelated to them.

    Args:
        pool (`str`): Which eight, of `POOLS`.
        cache_dir (`str` or `Path`, *optional*): The folder to keep them in; the quickstart's by default.

    Returns:
        `dict[str, list[dict]]`: for each task its rows, `{"task", "prompt", "completion", "options"}`, in a shuffled order
            that is always the same, no prompt twice; and, as `passages`, rows `{"text"}`.

    Raises:
        `RuntimeError`: if what was downloaded has another SHA-256 sum.
    """
    tasks, number = POOLS[pool]
    cache = Path(cache_dir or default_cache_dir()) / f"bigbench-evidence-{number}.json"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            archive = Path(folder) / "bigbench.tar.gz"
            urllib.request.urlretrieve(SDIST, archive)
            if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SDIST_SHA256:
                raise RuntimeError(f"{SDIST} has the SHA-256 sum {found}, expected {SDIST_SHA256}")
            write_json(cache, _read(archive, tasks))
    return read_json(cache)


def _read(archive: Path, tasks: Tasks) -> dict[str, list[Row]]:
    folders = {f"{TASKS_IN_SDIST}/{folder}/task.json": name for name, (folder, _) in tasks.items()}
    passages = f"{TASKS_IN_SDIST}/{PASSAGES_IN_SDIST}/task.json"
    examples: dict[str, list[Row]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in folders or member.name == passages:
                file = tar.extractfile(member)
                assert file is not None
                examples[folders.get(member.name, "passages")] = json.load(file)["examples"]
    rows = {name: _rows(name, make, examples[name]) for name, (_, make) in tasks.items()}
    texts = {example["input"].removeprefix("Passage: ").strip() for example in examples["passages"]}
    drawn = random.Random("passages").sample(sorted(texts), PASSAGES)
    return {**rows, "passages": [{"text": text} for text in drawn]}


def _rows(name: str, make: MakeRow, examples: list[Row]) -> list[Row]:
    generator = random.Random(name)
    made: dict[str, Row] = {}
    for example in generator.sample(examples, len(examples)):
        row = make(example, generator)
        if row is not None and len(made) < MOST_ROWS:
            made.setdefault(row["prompt"], {**row, "task": name})
    return list(made.values())
