"""The command `p2d`: each of its subcommands calls one public function and writes what it gives."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .dataset_files import check_new, read_dataset, write_dataset
from .heads import HeadSet, localize_heads
from .heads.localize import LocalizeMethod
from .model_state import model_device
from .version import __version__


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    from .selection.selector import ScorerName

    parser = argparse.ArgumentParser(prog="p2d", description="From Parameters to Data, step by step.")
    parser.add_argument("--version", action="version", version=f"p2d_peft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True)
    data = "a .jsonl, .json, .parquet or .csv file, a folder of `save_to_disk`, or a name on the Hub with :split"

    heads = commands.add_parser("heads", help="find the heads that matter for a task")
    _add_model(heads)
    heads.add_argument("--data", required=True, help=f"samples of the task: {data}")
    heads.add_argument("--method", choices=get_args(LocalizeMethod), default="proxy", help="default: %(default)s")
    heads.add_argument("--samples", type=int, default=100, help="at most so many rows of --data (%(default)s)")
    heads.add_argument("--ratio", type=float, default=0.1, help="share of the heads to choose (%(default)s)")
    heads.add_argument("--per-layer", type=int, help="at most so many heads of one layer")
    heads.add_argument("--output", type=Path, required=True, help="where to write the chosen heads, as JSON")
    heads.add_argument("--scores", type=Path, help="where to write the scores of all heads, as JSON")
    heads.add_argument("--plot", type=Path, help="where to draw the scores (.png, .svg, .pdf)")
    heads.set_defaults(run=run_heads)

    select = commands.add_parser("select", help="pick the rows of a pool that are worth training on")
    _add_model(select)
    select.add_argument("--pool", required=True, help=f"rows to choose from: {data}")
    select.add_argument("--target", help="samples of the task, for scorers that need them")
    select.add_argument("--heads", type=Path, help="what `p2d heads` wrote, for scorers that need it")
    select.add_argument("--scorer", choices=get_args(ScorerName), default="affinity", help="default: %(default)s")
    size = select.add_mutually_exclusive_group()
    size.add_argument("--ratio", type=float, help="share of the rows to keep (0.1)")
    size.add_argument("--num-samples", type=int, help="number of rows to keep")
    size.add_argument("--max-tokens", type=int, help="number of tokens to keep")
    select.add_argument("--output", required=True, help="where to write the rows: .jsonl, .parquet, .csv or a folder")
    select.add_argument("--cache-dir", type=Path, help="folder to keep scores in, to go on from after a crash")
    select.add_argument("--plot", type=Path, help="where to draw a histogram of the scores (.png, .svg, .pdf)")
    select.add_argument("--show", type=int, default=0, metavar="N", help="print the N best and the N worst rows")
    select.set_defaults(run=run_select)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument(
        "--dtype", default="auto", help="of its weights: auto, float32, bfloat16, float16 (%(default)s)"
    )
    parser.add_argument("--device", help="where it runs; a GPU if there is one")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens a row is cut off at (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a forward pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="for all that is random (%(default)s)")


def _load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase, SFTConfig]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model = model.to(args.device or accelerator or "cpu")
    config = SFTConfig(bf16=False, report_to="none", max_length=args.max_length)
    return model, AutoTokenizer.from_pretrained(args.model), config


def _save_plot(ax: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path)
    print(f"drawn to {path}")


def run_heads(args: argparse.Namespace) -> None:
    """`p2d heads`"""
    from .selection.samples import prepare_samples

    data = read_dataset(args.data).shuffle(seed=args.seed)
    data = data.select(range(min(args.samples, len(data))))
    model, tokenizer, config = _load(args)
    samples = prepare_samples(data, tokenizer, config, name="data")
    batches = [batch for _, batch in samples.batches(args.batch_size, model_device(model))]
    scores = localize_heads(model, batches, method=args.method, seed=args.seed)
    heads = scores.top(args.ratio, per_layer=args.per_layer)
    heads.save(args.output)
    print(f"{len(heads)} of {scores.n_heads} heads by {args.method} in {scores.seconds:.1f} s: {heads.by_layer()}")
    print(f"written to {args.output}")
    if args.scores:
        scores.save(args.scores)
        print(f"all scores written to {args.scores}")
    if args.plot:
        _save_plot(scores.plot(heads), args.plot)


def run_select(args: argparse.Namespace) -> None:
    """`p2d select`"""
    from .selection import P2DDataSelector
    from .selection.pool import extremes

    check_new(args.output)
    heads = HeadSet.load(args.heads) if args.heads else None
    pool = read_dataset(args.pool)
    target = read_dataset(args.target) if args.target else None
    model, tokenizer, config = _load(args)
    selector = P2DDataSelector(
        model,
        tokenizer,
        heads=heads,
        target=target,
        scorer=args.scorer,
        ratio=args.ratio,
        num_samples=args.num_samples,
        max_tokens=args.max_tokens,
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
        from .report.score_plots import plot_scores

        _save_plot(plot_scores(scored, selector.rows or ()), args.plot)
    if args.show:
        for row in extremes(pool, scored, args.show):
            number, score = row.pop("p2d_row"), row.pop("p2d_score")
            print(f"{number:8} {score:12.5g}  {_short(json.dumps(row, ensure_ascii=False, default=str))}")


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command line.

    Returns:
        `int`: 0, or 2 after an error, of which one line is printed.
    """
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except Exception as error:
        if args.debug:
            raise
        print(f"p2d {args.command}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
