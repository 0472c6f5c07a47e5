"""`p2d report`: what a run did and what it cost, to read in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `p2d`."""
    report = commands.add_parser("report", help="print what a run did and what it cost")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the run's `output_dir`, or its p2d_report.json")
    report.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read and print."""
    from ..report import P2DReport
    from ..report.run_report import REPORT_NAME
    from ..report.text import report_text

    path = args.run_folder / REPORT_NAME if args.run_folder.is_dir() else args.run_folder
    if not path.is_file():
        raise ValueError(f"There is no '{path}'. P2DTrainer writes it at the end of a training.")
    print(report_text(P2DReport.load(path)))
