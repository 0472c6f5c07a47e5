"""
Which rows and which weights to train: arms as a YAML file declares them, run and summed up.

    python benchmarks/run_evidence.py run benchmarks/evidence/profiles/small.yaml --jobs 2
    python benchmarks/run_evidence.py report
    python benchmarks/run_evidence.py check benchmarks/evidence/profiles/paper.yaml

`run` writes one file for each arm into `--output`, with which it goes on wherever it was stopped: what is there is not
run again. SmolLM2-135M-Instruct and BIG-bench's rows come from PyPI. `report` writes `docs/results.md` and its pictures from these files. `check` says
what a profile would run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from datasets.utils.logging import disable_progress_bar
from environment import command
from evidence import page, plots
from evidence.profile import Profile, planned
from evidence.runner import Runner
from evidence.summary import read_evidence
from evidence.tasks import load_tasks
from quickstart import HUB_MODEL
from quickstart_data import fetch_model

from p2d_peft.files import replacing


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "evidence"


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """Run the arms that are missing, in `--jobs` processes."""
    profile = Profile.read(args.profile)
    tasks = load_tasks(profile, dict(args.dataset))
    model = args.model or (str(fetch_model()) if profile.model == HUB_MODEL else profile.model)
    if args.jobs > 1:  # model and rows are there now, so that not all ask for them at once
        own = [sys.executable, str(Path(__file__)), "run", str(args.profile), "--output", str(args.output)]
        own += ["--model", args.model] if args.model else []
        own += ["--dataset", *map("=".join, args.dataset)] if args.dataset else []
        own += ["--threads", str(args.threads)]
        running = [subprocess.Popen([*own, "--part", f"{i}/{args.jobs}"]) for i in range(args.jobs)]
        if failed := [code for process in running if (code := process.wait())]:
            sys.exit(f"{len(failed)} of {args.jobs} processes failed; what they finished is in {args.output}")
        return
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    runner = Runner(profile, tasks, model, args.output, command("run_evidence.py", arguments))
    for target in profile.targets():
        runner.base(target)
    start = time.perf_counter()
    for arm in planned(profile, runner.best_rate, args.part):
        if runner.path(arm).exists():
            continue
        result = runner.run(arm)
        numbers = "  ".join(
            f"{name} NLL {found['nll']:.3f} exact {found['exact_match']:.2f}" for name, found in result["test"].items()
        )
        print(f"{(time.perf_counter() - start) / 60:6.1f} min  {runner.path(arm).stem}  {numbers}", flush=True)


def report(results: Path, docs: Path, readme: Path) -> None:
    """Write the page, its pictures and the README's table from what is in `results`."""
    evidence = read_evidence(results)
    pictures = plots.save_plots(evidence, results, docs / "results")
    texts = {
        docs / "results.md": page.page(evidence, results, pictures),
        readme: page.with_results(readme.read_text(encoding="utf-8"), page.readme_table(evidence)),
    }
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I < N")
    return int(index), int(count)


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
    runs.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    runs.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    runs.add_argument("--part", type=_part, default=(0, 1), help="I/N: only every N-th cell, from the I-th on")
    reports = commands.add_parser("report", help="write docs/results.md, its pictures and the README's table")
    reports.add_argument("--output", type=Path, default=RESULTS, help="where the results are")
    checks = commands.add_parser("check", help="say what a profile would run")
    checks.add_argument("profile", type=Path)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args, arguments)
    elif args.command == "report":
        report(args.output, ROOT / "docs", ROOT / "README.md")
    else:
        profile = Profile.read(args.profile)
        cells = profile.cells()
        arms = sum(len(profile.rates(cell)) + len(seeds) - 1 for cell, seeds in cells.items())
        print(f"{len(cells)} cells, {arms} arms, targets {', '.join(profile.targets())}")


if __name__ == "__main__":
    main()
