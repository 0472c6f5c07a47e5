"""The tables of docs/compatibility.md and README.md are what tests/compatibility.py makes, and cells of each row still hold."""

import re

import pytest
import transformers
from packaging.version import Version

from .compatibility import CHECKS, PAGE, README, SIGNS, full_table, name_of, outcome, replaced, short_table
from .tiny_models import LAYOUTS


# each trains or exports or runs a model; the others are tested for themselves, on some of the layouts, or take longer
TRIED = ("trains", "exact LoRA", "`gate`", "`icl`")
# what the page's versions refuse and a later transformers lets work: layout, check -> from which version on
WORKS_SINCE = {("codegen", "`icl`"): "5.24"}


def outcomes():
    """What the page says, by layout and check."""
    meanings = {sign: meaning for meaning, sign in SIGNS.items()}
    rows = re.findall(r"^\| \S+ \(`(\S+)`\) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        name: {check: meanings[cell.strip()] for check, cell in zip(CHECKS, cells.split("|"), strict=True)}
        for name, cells in rows
    }


def test_the_pages_have_the_tables():
    said = outcomes()
    assert list(said) == list(LAYOUTS), "run `python -m tests.compatibility`"
    for page, made in ((PAGE, full_table(said)), (README, short_table(said))):
        assert page.read_text(encoding="utf-8") == replaced(page.read_text(encoding="utf-8"), made), page


def test_what_is_refused_is_told_of():
    text = PAGE.read_text(encoding="utf-8").partition("## What is refused")[2]
    for name, cells in outcomes().items():
        if "refused" in cells.values():
            assert name_of(LAYOUTS[name]).lower() in re.sub("[ -]", "", text).lower(), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_the_page_says_holds(name):
    for check in TRIED:
        since = WORKS_SINCE.get((name, check))
        works = since is not None and Version(transformers.__version__) >= Version(since)
        assert outcome(LAYOUTS[name], CHECKS[check]) == ("yes" if works else outcomes()[name][check]), check
