"""`p2d select`: pick the rows of a pool that are worth training on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from ..dataset_files import check_new_dataset, read_dataset, write_dataset
from ..files import check_new, check_writable
from .common import (
    DATA,
    add_model,
    check_plot,
    count,
    load_model,
    load_tokenizer,
    read_heads,
    save_plot,
    share,
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `p2d`."""
    from ..selection.selector import ScorerName

    select = commands.add_parser("select", help="pick the rows of a pool that are worth training on")
    add_model(select)
    select.add_argument("--pool", required=True, help=f"rows to choose from: {DATA}")
    select.add_argument("--target", help="samples of the task, for scorers that need them")
    select.add_argument(
        "--heads",
        help="what `p2d heads` wrote, or the folder or Hub id of an adapter, for scorers that need heads",
    )
    select.add_argument("--scorer", choices=get_args(ScorerName), default="affinity", help="default: %(default)s")
    size = select.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=share, help="share of the rows to keep (0.1)")
    size.add_argument("--num-samples", type=count, help="number of rows to keep")
    size.add_argument("--max-tokens", type=count, help="number of tokens to keep")
    select.add_argument(
        "--round-robin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the target's samples take turns in picking rows, where the scorer compares rows with each of them",
    )
    select.add_argument("--output", required=True, help="where to write the rows: .jsonl, .parquet, .csv or a folder")
    select.add_argument("--cache-dir", type=Path, help="folder to keep scores in, to go on from after a crash")
    select.add_argument("--plot", type=Path, help="where to draw a histogram of the scores (.png, .svg, .pdf)")
    select.add_argument("--show", type=count, default=0, metavar="N", help="print the N best and the N worst rows")
    select.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score, choose and write."""
    from ..selection import P2DDataSelector
    from ..selection.policies import RoundRobin
    from ..selection.pool import extremes
    from ..selection.row_checks import check_rows
    from ..selection.selector import needs_heads, needs_target, scores_per_target

    check_new_dataset(args.output)
    if args.plot:
        check_new(args.plot)
        check_plot(args.plot)
    for option, path in (("--plot", args.plot), ("--cache-dir", args.cache_dir)):
        if path is not None and Path(args.output).resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{option} '{path}' is where --output '{args.output}' is to be; give another place.")
    if args.cache_dir:
        check_writable(args.cache_dir / "run")
    for needed, given, option in (
        (needs_heads(args.scorer), args.heads, "--heads, what `p2d heads` wrote"),
        (needs_target(args.scorer), args.target, "--target, a few samples of the task"),
    ):
        if needed and not given:
            raise ValueError(f"--scorer {args.scorer} needs {option}.")
    heads = read_heads(args.heads) if args.heads else None
    pool = read_dataset(args.pool)
    check_new_dataset(args.output, pool.features)
    target = read_dataset(args.target) if args.target else None
    tokenizer, config = load_tokenizer(args)
    for name, dataset in (("pool", pool), ("target", target)):
        if dataset is not None:
            check_rows(dataset, tokenizer, config, None, name)
    if args.num_samples and args.num_samples > len(pool):
        raise ValueError(
            f"--num-samples {args.num_samples} is more than the {len(pool)} rows of --pool '{args.pool}'."
        )
    model = load_model(args, heads, needs_heads(args.scorer))
    selector = P2DDataSelector(
        model,
        tokenizer,
        heads=heads,
        target=target,
        scorer=args.scorer,
        ratio=args.ratio,
        num_samples=args.num_samples,
        max_tokens=args.max_tokens,
        policies=[RoundRobin()] if args.round_robin and scores_per_target(args.scorer) else [],
        args=config,
        batch_size=args.batch_size,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )
    selected = selector.select(pool)
    write_dataset(selected, args.output)
    report, scored = selector.report, selector.scores
    assert report is not None and scored is not None
    print(f"{len(selected)} of {report.n_rows} rows by {args.scorer} in {report.seconds:.1f} s")
    print(f"written to {args.output}")
    if args.plot:
        from ..report.score_plots import plot_scores

        save_plot(plot_scores(scored, selector.rows or ()), args.plot)
    if args.show:
        for row in extremes(pool, scored, args.show):
            number, score = row.pop("p2d_row"), row.pop("p2d_score")
            print(f"{number:8} {score:12.5g}  {_short(json.dumps(row, ensure_ascii=False, default=str))}")


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
