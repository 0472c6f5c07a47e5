"""
Which rows and which weights to train: arms as a YAML file declares them, run and summed up.

    python benchmarks/run_evidence.py run benchmarks/evidence/profiles/small.yaml --jobs 2
    python benchmarks/run_evidence.py report
    python benchmarks/run_evidence.py check benchmarks/evidence/profiles/paper_llama.yaml
    python benchmarks/run_evidence.py compare RERUN

`run` writes one file for each arm into `--output`, with which it goes on wherever it was stopped: what is there is not
run again. SmolLM2-135M-Instruct and BIG-bench's rows come from PyPI. `report` writes a page and its pictures from these files:
of our own results `docs/results.md`, and the README's table. `check` says what a profile would run, and `compare` whether a rerun
ended where our run did.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from datasets.utils.logging import disable_progress_bar
from environment import command
from evidence import page, plots
from evidence.compare import compare
from evidence.profile import Profile
from evidence.runner import Runner
from evidence.schedule import run_all
from evidence.tasks import load_tasks
from quickstart import HUB_MODEL
from quickstart_data import fetch_model
from transformers.utils import logging

from p2d_peft.files import replacing, write_json


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "evidence"
PAGE = ROOT / "docs" / "results.md"


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """Run what is missing of a profile, in `--jobs` processes."""
    profile = Profile.read(args.profile)
    tasks = load_tasks(profile, dict(args.dataset))
    model = args.model or (str(fetch_model()) if profile.model == HUB_MODEL else profile.model)
    called = command("run_evidence.py", arguments)
    part = profile.only(args.only) if args.only else profile
    run_all(part, partial(make_runner, args.threads, profile, tasks, model, args.output, called, args.jobs), args.jobs)


def make_runner(threads: int, *arguments: Any) -> Runner:
    """A process's runner."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    logging.disable_progress_bar()
    return Runner(*arguments)


def report(results: Path, to: Path, readme: Path | None) -> None:
    """Write a page and its pictures from what is in `results`, and the README's table where there is a README."""
    evidence, others = page.read_results(results), page.read_others(results)
    pictures = plots.save_plots(evidence, results, to.with_suffix(""))
    texts = {to: page.page(evidence, results, [f"{to.stem}/{name}" for name in pictures], others)}
    if readme is not None:
        texts[readme] = page.with_results(readme.read_text(encoding="utf-8"), page.readme_tables(evidence, others))
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _pair(text: str) -> tuple[str, str]:
    name, found, folder = text.partition("=")
    if not found or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is not ID=FOLDER with a folder that exists")
    return name, folder


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the arms of a profile that have no result yet")
    runs.add_argument("profile", type=Path)
    runs.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results/evidence")
    runs.add_argument("--model", help="folder or Hub id, in place of the profile's")
    runs.add_argument(
        "--dataset", type=_pair, nargs="+", default=[], metavar="ID=FOLDER", help="datasets that are not to be fetched"
    )
    runs.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="only cells with one of these in their names, 'SETTING TARGET DATA WEIGHTS'",
    )
    runs.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    runs.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    reports = commands.add_parser(
        "report", help="write a page and its pictures, and with docs/results.md the README's table"
    )
    reports.add_argument("--output", type=Path, default=RESULTS, help="where the results are")
    reports.add_argument(
        "--page", type=Path, help="default: docs/results.md for our own results, else page.md beside the results"
    )
    checks = commands.add_parser("check", help="say what a profile would run")
    checks.add_argument("profile", type=Path)
    checks.add_argument("--only", nargs="+", metavar="TEXT", help="as for `run`")
    compares = commands.add_parser("compare", help="say whether a rerun ended where an earlier run did")
    compares.add_argument("rerun", type=Path, help="the --output of the rerun")
    compares.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results/evidence")
    compares.add_argument("--save", type=Path, help="where to write it as JSON")
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args, arguments)
    elif args.command == "report":
        # a rerun of a part must not take the place of what is published
        to = args.page or (PAGE if args.output.resolve() == RESULTS.resolve() else args.output / "page.md")
        report(args.output, to, ROOT / "README.md" if to.resolve() == PAGE.resolve() else None)
    elif args.command == "compare":
        found = compare(args.rerun, args.output)
        print(json.dumps({name: value for name, value in found.items() if name != "where"}, indent=2))
        if args.save:
            write_json(args.save, found)
    else:
        profile = Profile.read(args.profile)
        profile = profile.only(args.only) if args.only else profile
        cells = profile.cells()
        arms = sum(len(profile.rates(cell)) + len(seeds) - 1 for cell, seeds in cells.items())
        for cell in cells:
            print(cell)
        print(f"{len(cells)} cells, {arms} arms, targets {', '.join(profile.targets())}")


if __name__ == "__main__":
    main()
