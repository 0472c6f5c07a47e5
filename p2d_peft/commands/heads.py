"""`p2d heads`: find the heads that matter for a task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ..dataset_files import read_dataset
from ..files import check_writable
from ..heads import HeadScores, HeadSet, localize_heads
from ..heads.localize import LocalizeMethod
from ..model_state import model_device
from .common import DATA, add_model, check_plot, count, load_model, load_tokenizer, save_plot, share


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `p2d`."""
    heads = commands.add_parser("heads", help="find the heads that matter for a task")
    add_model(heads)
    heads.add_argument("--data", required=True, help=f"samples of the task: {DATA}")
    heads.add_argument(
        "--method",
        required=True,
        choices=get_args(LocalizeMethod),
        help="proxy is the paper's; random a draw, than which no other was seen to be better",
    )
    heads.add_argument("--samples", type=count, default=100, help="at most so many rows of --data (%(default)s)")
    heads.add_argument("--ratio", type=share, default=0.1, help="share of the heads to choose (%(default)s)")
    heads.add_argument("--per-layer", type=count, help="at most so many heads of one layer; spread evenly by default")
    heads.add_argument("--per-group", type=count, help="at most so many of the heads that share their keys and values")
    part = heads.add_mutually_exclusive_group()
    part.add_argument(
        "--last-layers", type=share, help="only of this share of the layers, from the last: cheap to train"
    )
    part.add_argument("--first-layers", type=share, help="the same from the first: cheap to score rows by")
    heads.add_argument("--output", type=Path, required=True, help="where to write the chosen heads, as JSON")
    heads.add_argument("--scores", type=Path, help="where to write the scores of all heads, as JSON")
    heads.add_argument("--plot", type=Path, help="where to draw the scores (.png, .svg, .pdf)")
    heads.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Localize, choose and write."""
    from ..selection.samples import prepare_samples

    written = [path for path in (args.output, args.scores, args.plot) if path is not None]
    if len(set(written)) < len(written):
        raise ValueError(
            f"--output, --scores and --plot must be files of their own, got {', '.join(map(str, written))}."
        )
    for path in written:
        check_writable(path)
    if args.plot:
        check_plot(args.plot)
    data = read_dataset(args.data).shuffle(seed=args.seed)
    data = data.select(range(min(args.samples, len(data))))
    tokenizer, config = load_tokenizer(args)
    samples = prepare_samples(data, tokenizer, config, name="data")
    model = load_model(args)
    batches = [batch for _, batch in samples.batches(args.batch_size, model_device(model))]
    _choose(localize_heads(model, [], method="random"), args)  # whether that many heads can be had is told at once
    scores = localize_heads(model, batches, method=args.method, seed=args.seed)
    if args.scores:
        scores.save(args.scores)
        print(f"all scores written to {args.scores}")
    heads = _choose(scores, args)
    heads.save(args.output)
    print(f"{len(heads)} of {scores.n_heads} heads by {args.method} in {scores.seconds:.1f} s: {heads.by_layer()}")
    print(f"written to {args.output}")
    if args.plot:
        save_plot(scores.plot(heads), args.plot)


def _choose(scores: HeadScores, args: argparse.Namespace) -> HeadSet:
    return scores.top(
        args.ratio,
        per_layer=args.per_layer or "even",
        per_group=args.per_group,
        first_layers=args.first_layers,
        last_layers=args.last_layers,
    )
