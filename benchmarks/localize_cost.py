"""
What localizing costs, next to full fine-tuning on the same samples.

    python benchmarks/localize_cost.py --model FOLDER --train train.jsonl --output benchmarks/results/localize_cost.json

Arms take turns in one process, in an order drawn anew for each round: each method's `localize_heads` over the samples, and `full`,
the steps of full fine-tuning by AdamW over the same batches. A ratio is the median over the rounds of the ratio within a round; times
the number of samples it is how many samples full fine-tuning would have seen meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar
from environment import command, load_average, machine, versions
from rounds import median_ratio, time_rounds
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from p2d_peft import localize_heads
from p2d_peft.files import write_json
from p2d_peft.heads.localize import LocalizeMethod
from p2d_peft.selection.samples import prepare_samples


# a pass for each head: hours where the others take minutes
FOR_EACH_HEAD = ("ablation", "trained")


def full_steps(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
    """The steps of full fine-tuning over the batches; the optimizer has made its state by then."""
    trained = copy.deepcopy(model).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def run(some: list[dict[str, torch.Tensor]]) -> None:
        for batch in some:
            trained(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(batches[:1])
    return partial(run, batches)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cheap = [method for method in get_args(LocalizeMethod) if method not in FOR_EACH_HEAD]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--train", required=True, help="JSON lines with the fields prompt and completion")
    parser.add_argument("--samples", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--methods", nargs="+", default=cheap, choices=get_args(LocalizeMethod), help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of samples and turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.train, split="train").shuffle(seed=args.seed)
    rows = rows.select_columns(["prompt", "completion"]).select(range(args.samples))
    samples = prepare_samples(rows, tokenizer, SFTConfig(bf16=False, report_to="none"))
    batches = [batch for _, batch in samples.batches(args.batch_size, torch.device("cpu"))]
    arms: dict[str, Callable[[], Any]] = {
        method: partial(localize_heads, model, batches, method) for method in args.methods
    }

    load_before = load_average()
    seconds = time_rounds({"full": full_steps(model, batches), **arms}, args.rounds, args.seed)
    ratios = {method: median_ratio(seconds[method], seconds["full"]) for method in args.methods}
    result = {
        "command": command("localize_cost.py", sys.argv[1:] if argv is None else argv),
        "machine": {**machine(), "load_average_before": load_before, "load_average_after": load_average()},
        "versions": versions(),
        "samples": len(samples),
        "tokens": samples.n_tokens,
        "seconds": seconds,
        "localizing / full fine-tuning": ratios,
        "samples of full fine-tuning": {method: ratio * len(samples) for method, ratio in ratios.items()},
    }
    for method, ratio in ratios.items():
        print(f"{method:10} {statistics.median(seconds[method]):8.2f} s  {ratio * len(samples):8.1f} samples")
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
