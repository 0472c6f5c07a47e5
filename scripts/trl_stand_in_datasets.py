"""
The datasets that TRL's tests of `SFTTrainer` load from the Hub, as stand-ins of the same configs, splits and columns. They
are folders of their names: in the current directory, that is what `load_dataset` finds first.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, concatenate_datasets


TEST_ROWS = 2


def aphorisms() -> list[str]:
    """The Zen of Python, which TRL's `zen` is made of, too: 19 rows, of which the last two are the test split."""
    with redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]


def _parts() -> list[tuple[str, str, str]]:
    """For each aphorism what it starts with, how it ends, and how it does not end."""
    split = [aphorism.rpartition(" ") for aphorism in aphorisms()]
    ends = [f" {end}" for _, _, end in split]
    return [(start, end, wrong) for (start, _, _), end, wrong in zip(split, ends, ends[1:] + ends[:1], strict=True)]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _zen() -> dict[str, Dataset]:
    parts = _parts()
    question, answer = (
        [[_user(f"How does it go on: {start}")] for start, _, _ in parts],
        [[_assistant(end.strip())] for _, end, _ in parts],
    )
    return {
        "standard_language_modeling": Dataset.from_dict({"text": aphorisms()}),
        "standard_prompt_completion": Dataset.from_dict(
            {"prompt": [start for start, _, _ in parts], "completion": [end for _, end, _ in parts]}
        ),
        "standard_implicit_prompt_preference": Dataset.from_dict(
            {"chosen": aphorisms(), "rejected": [start + wrong for start, _, wrong in parts]}
        ),
        "conversational_language_modeling": Dataset.from_dict(
            {"messages": [a + b for a, b in zip(question, answer, strict=True)]}
        ),
        "conversational_prompt_completion": Dataset.from_dict({"prompt": question, "completion": answer}),
    }


def _harmony() -> dict[str, Dataset]:
    """Messages with thoughts, and arguments for the chat template of GPT-OSS."""
    question, answer, settings = [], [], []
    for row, (start, end, _) in enumerate(_parts()):
        question.append([{"role": "system", "content": "Be brief."}, _user(f"How does it go on: {start}")])
        answer.append([{**_assistant(end.strip()), "thinking": "I know that by heart."}])
        settings.append({"reasoning_effort": ["low", "medium", "high"][row % 3], "model_identity": "You are a poet."})
    # a column of structs has the same fields in all rows
    whole = [
        [{**message, "thinking": message.get("thinking")} for message in a + b]
        for a, b in zip(question, answer, strict=True)
    ]
    return {
        "language_modeling": Dataset.from_dict({"messages": whole, "chat_template_kwargs": settings}),
        "prompt_completion": Dataset.from_dict(
            {"prompt": question, "completion": answer, "chat_template_kwargs": settings}
        ),
    }


def _toolcall() -> dict[str, Dataset]:
    """Conversations in which a tool is called, with the tools in JSON, and not the same in each row."""
    look_up = _tool("look_up", "Looks up an aphorism.", {"start": "How it starts."})
    count = _tool("count_letters", "Counts letters.", {"text": "Where to count.", "letter": "What to count."})
    messages = []
    for start, end, _ in _parts():
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"start": start}}}
        messages.append(
            [
                _user(f"How does it go on: {start}"),
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "name": "look_up", "content": start + end},
                _assistant(end.strip()),
            ]
        )
    tools = [json.dumps([look_up] if row % 2 else [count, look_up]) for row in range(len(messages))]
    return {"language_modeling": Dataset.from_dict({"messages": messages, "tools": tools})}


def _tool(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _images(count: int, shift: int) -> list[Any]:
    """Pictures of one color."""
    from PIL import Image as PillowImage

    return [PillowImage.new("RGB", (32, 32), (80 * image, 100, 12 * shift)) for image in range(count)]


def _with_images(config: str, counts: list[int]) -> Dataset:
    images = [_images(count, row) for row, count in enumerate(counts)]
    column = Dataset.from_dict({"images": images}, features=Features({"images": List(Image())}))
    return concatenate_datasets([_zen()[config], column], axis=1)


def _zen_image() -> dict[str, Dataset]:
    """With a picture in each row."""
    configs = ("conversational_language_modeling", "conversational_prompt_completion")
    return {config: _with_images(config, [1] * len(aphorisms())) for config in configs}


def _zen_multi_image() -> dict[str, Dataset]:
    """With none to two pictures in a row."""
    config = "conversational_prompt_completion"
    return {config: _with_images(config, [row % 3 for row in range(len(aphorisms()))])}


DATASETS = {
    "trl-internal-testing/zen": _zen,
    "trl-internal-testing/harmony": _harmony,
    "trl-internal-testing/toolcall": _toolcall,
    "trl-internal-testing/zen-image": _zen_image,
    "trl-internal-testing/zen-multi-image": _zen_multi_image,
}


def make_datasets(folder: Path) -> None:
    """
    Write all datasets into folders of their names.

    Args:
        folder (`Path`): Where `load_dataset` is called, as the current directory.
    """
    for name, make in DATASETS.items():
        place = folder / name
        for config, dataset in make().items():
            splits = dataset.train_test_split(test_size=TEST_ROWS, shuffle=False)
            for split, rows in splits.items():
                path = place / config / f"{split}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(path)
        _write_card(place)


def _write_card(place: Path) -> None:
    """What tells `load_dataset` which files are which config and split."""
    configs = sorted(path.name for path in place.iterdir())
    lines: Iterable[str] = (
        line
        for config in configs
        for line in (
            f"- config_name: {config}",
            "  data_files:",
            *(f"  - split: {split}\n    path: {config}/{split}.parquet" for split in ("train", "test")),
        )
    )
    (place / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
