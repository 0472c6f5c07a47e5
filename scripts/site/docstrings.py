"""
An extension of Griffe that reads the docstrings of this project, which follow Hugging Face's style, as Google's.

Hugging Face writes `name (`type`, *optional*, defaults to `x`): ...` and links as [`Name`]. The signatures have the types
and the defaults, so here the parentheses are dropped; links lead to what the pages of the API reference document, and
what they do not is plain code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe


API = Path(__file__).parents[2] / "docs" / "api"
DOCUMENTED = {
    path.rpartition(".")[2]: path
    for page in API.glob("*.md")
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}

PARAMETER = re.compile(r"^(\s+)([\w*][\w*, ]*) \(\[?`.*\):(?=\s|$)", re.MULTILINE)
RESULT = re.compile(r"^(\s*(?:Raises|Returns|Yields):\n)?(\s+)\[?`([^`\n]+)`\]?:(?= )", re.MULTILINE)
LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


def as_google(docstring: str) -> str:
    """A docstring of ours in the form that Griffe's Google parser reads."""

    def link(match: re.Match[str]) -> str:
        name = match[1].removeprefix("p2d_peft.")
        shown = name.rpartition(".")[2] if "~" in match[0] else name
        target = DOCUMENTED.get(name) or DOCUMENTED.get(name.partition(".")[0])
        return f"[`{shown}`][{target}]" if target else f"`{shown}`"

    docstring = PARAMETER.sub(r"\1\2:", docstring)
    docstring = RESULT.sub(lambda match: f"{match[1] or ''}{match[2]}{match[3]}:", docstring)
    return LINK.sub(link, docstring)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_google(obj.docstring.value)
