"""`p2d report`: what a run did and what it cost, to read in the terminal or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `p2d`."""
    report = commands.add_parser("report", help="tell what a run did and what it cost")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the run's `output_dir`, or its p2d_report.json")
    report.add_argument(
        "other_folder", type=Path, metavar="OTHER", nargs="?", help="another run, to compare the heads"
    )
    report.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page, in place of printing")
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read, and print or write."""
    from ..report.overlap import compare_heads
    from ..report.page import check_page_name, save_page
    from ..report.run_folder import Run
    from ..report.text import overlap_text, report_text

    if args.html is not None:
        check_page_name(args.html)
    ours = Run.read(args.run_folder)
    other = None if args.other_folder is None else Run.read(args.other_folder)
    if args.html is not None:
        save_page(args.html, ours, other)
        print(f"written to {args.html}")
        return
    print(report_text(ours.report))
    if other is not None:
        print(overlap_text(compare_heads(ours, other)))
