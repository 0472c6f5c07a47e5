"""
A run as one HTML page, and a report as a fragment of it for notebooks.

The page is made of Jinja templates with autoescape: charts are inline SVG and the head map is a table, so it needs no
network, no plotting library and no data in a script. Its one script is always the same, and the page's policy lets no
other run: text of the pool or of a report that comes from anyone stays text.
"""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..files import replacing
from . import charts
from .charts import compared_histogram, line_chart, number, stacked_histogram
from .costs import Costs
from .map_table import map_table
from .overlap import compare_heads
from .reproduce import reproduction
from .run_folder import Run
from .run_report import P2DReport


_TEMPLATES = Path(__file__).parent / "templates"


def save_page(path: str | Path, run: Run, other: Run | None = None) -> None:
    """
    Write a run as one HTML page that needs nothing else.

    Args:
        path (`str` or `Path`): The file; one that is there is replaced, so its name has to end in `.html`.
        run ([`Run`]): The run.
        other ([`Run`], *optional*): Another run, whose heads are compared.

    Raises:
        `ValueError`: if `path` has another ending, or `other` has no heads or those of a model of another shape.
    """
    check_page_name(path)
    html = page(run, other)
    with replacing(path) as temporary:
        # a text from JSON may hold half a surrogate pair, which no file can
        temporary.write_text(html, encoding="utf-8", errors="replace")


def check_page_name(path: str | Path) -> None:
    """
    Check, before any work, that a page may be written to `path`.

    Raises:
        `ValueError`: if its name does not end in `.html`: it might be a file that is dear to someone.
    """
    if Path(path).suffix not in (".html", ".htm"):
        raise ValueError(f"A page's name must end in .html, got '{path}'.")


def page(run: Run, other: Run | None = None) -> str:
    """The page as text; see [`save_page`]."""
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    report = run.report
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            run=run,
            costs=Costs.of(report),
            style=_style(),
            script=Markup(script),
            script_digest=digest,
            head_map=map_table(run),
            overlap=None if other is None else compare_heads(run, other),
            shared_map=None if other is None else map_table(run, other.heads),
            scores=None if run.selection is None else stacked_histogram(run.selection.scores, run.selection.cut),
            lengths=None if run.selection is None else compared_histogram(run.selection.lengths, _tokens),
            curves=[line_chart(chart) for chart in run.curves],
            commands=reproduction(report),
        )
    )


def report_fragment(report: P2DReport) -> str:
    """The costs and the choices of a report as HTML, to be put into a page of someone else's."""
    html: str = (
        _environment().get_template("fragment.html").render(report=report, costs=Costs.of(report), style=_style())
    )
    return html


def _style() -> Markup:
    return Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "bytes": _bytes, "percent": _percent, "seconds": _seconds}
    environment.globals["plot"] = charts
    return environment


def _tokens(low: float, high: float) -> str:
    first, last = math.ceil(low), math.ceil(high) - 1
    return f"{first:,} tokens" if first >= last else f"{first:,} to {last:,} tokens"


def _bytes(value: float) -> str:
    """Bytes to read, as file managers and `ls -h` count them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:,.3g} {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:,.3g} %"


def _seconds(value: float) -> str:
    """A time to read: seconds up to ten minutes, then minutes, then hours."""
    if value < 600:
        return f"{value:,.1f} s"
    return f"{value / 60:,.0f} min" if value < 2 * 3600 else f"{value / 3600:,.1f} h"
