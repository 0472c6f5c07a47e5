"""Small datasets of every type that SFTTrainer takes, made on the spot."""

from __future__ import annotations

import json
import random
import string

from datasets import Dataset


def rows(n: int = 24, seed: int = 0) -> list[dict]:
    """Rows of two tasks in turn: to repeat a word, and to say how many letters it has."""
    draw = random.Random(seed)
    made = []
    for index in range(n):
        word = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9)))
        task = "copy" if index % 2 == 0 else "count"
        prompt, completion = (f"copy {word}:", f" {word}") if task == "copy" else (f"count {word}?", f" {len(word)}")
        made.append({"task": task, "prompt": prompt, "completion": completion})
    return made


def prompt_completion(n: int = 24, seed: int = 0) -> Dataset:
    return Dataset.from_list(rows(n, seed))


def text(n: int = 24, seed: int = 0) -> Dataset:
    return Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows(n, seed)])


def conversational(n: int = 24, seed: int = 0) -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows(n, seed)
        ]
    )


# A chat template that spells out the tools, and marks what the assistant says.
TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}{{ 'tool ' + tool['function']['name'] + ' ' }}{% endfor %}"
    "{% for message in messages %}{{ message['role'] + ' ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)


def with_tools(n: int = 24, seed: int = 0, as_json: bool = False) -> Dataset:
    """Conversations of which each row has a tool of its own, as a list or as JSON."""
    names = [row["task"] + "tool" for row in rows(n, seed)]
    tools = [[{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}] for name in names]
    return conversational(n, seed).add_column("tools", [json.dumps(t) for t in tools] if as_json else tools)


def conversational_prompt_completion(n: int = 24, seed: int = 0) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows(n, seed)
        ]
    )


def pre_tokenized(n: int = 24, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        ids = [draw.randint(7, 80) for _ in range(draw.randint(5, 15))]
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return Dataset.from_list(made)


KINDS = {
    "text": text,
    "prompt_completion": prompt_completion,
    "conversational": conversational,
    "conversational_prompt_completion": conversational_prompt_completion,
    "pre_tokenized": pre_tokenized,
}
