"""
What selecting by `affinity` costs, next to the forward pass that it cannot do without; and what bucketing by length gives.

    python benchmarks/selection_cost.py --model FOLDER --pool train.json --output benchmarks/results/selection_cost.json

Three arms take turns in one process, in an order drawn anew for each round:

- `affinity`: `P2DDataSelector.score` on the pool, from its text: tokenizing, the target's rows and all else included;
- `forward`: the bare forward pass without gradients over the very batches that `affinity` makes of the pool and of the
  target, as they were seen in a run before, up to and including the deepest selected layer, without the LM head. The model is cut
  off there;
- `unsorted`: the same, with the pool's rows in its own order instead of sorted by length.

A ratio is the median over the rounds of the ratio within a round. The heads are drawn at random from the lower part of
the layers that `--depth` gives, of which the last is always among them.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from environment import command, load_average, machine, versions
from rounds import median_ratio, time_rounds
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from p2d_peft import HeadSet, P2DDataSelector
from p2d_peft.files import write_json
from p2d_peft.heads import ModelGeometry
from p2d_peft.selection.samples import Samples, prepare_samples


def choose_heads(geometry: ModelGeometry, ratio: float, depth: float, seed: int) -> HeadSet:
    """Random heads from the lower `depth` of the layers, with one of the last of those among them."""
    deepest = max(round(depth * len(geometry)), 1) - 1
    within = [head for head in geometry.heads if head.layer <= deepest]
    generator = random.Random(seed)
    last = generator.choice([head for head in within if head.layer == deepest])
    count = max(1, round(ratio * len(geometry.heads)))
    return HeadSet([last, *generator.sample([head for head in within if head != last], min(count, len(within)) - 1)])


def cut_off(model: nn.Module, deepest: int) -> nn.Module:
    """The decoder without its LM head and without the layers above the deepest one, around the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    decoder = copy.deepcopy(model.get_decoder(), {id(tensor): tensor for tensor in tensors})
    decoder.layers = decoder.layers[: deepest + 1]
    return decoder


@torch.no_grad()
def forward(decoder: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def seen_batches(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, torch.Tensor]]:
    """The batches that a model is given while something runs."""
    seen: list[dict[str, torch.Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append({name: kwargs[name] for name in ("input_ids", "attention_mask")})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


def unsorted_batches(samples: Samples, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of rows in the order of the pool."""
    starts = range(0, len(samples), batch_size)
    parts = [samples.subset(list(range(start, min(start + batch_size, len(samples))))) for start in starts]
    return [batch for part in parts for _, batch in part.batches(batch_size, torch.device("cpu"))]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--pool", required=True, help="JSON file with the columns --prompt and --completion")
    parser.add_argument("--prompt", default="question", help="default: %(default)s")
    parser.add_argument("--completion", default="answer", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=256, help="rows of the pool to score (default: %(default)s)")
    parser.add_argument("--target-rows", type=int, default=8, help="rows of the target (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the heads (default: %(default)s)")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the layers to pass (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of heads, rows and turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.pool, split="train").shuffle(seed=args.seed)
    rows = rows.rename_columns({args.prompt: "prompt", args.completion: "completion"})
    rows = rows.select_columns(["prompt", "completion"])
    pool = rows.select(range(args.rows))
    target = rows.select(range(args.rows, args.rows + args.target_rows))
    heads = choose_heads(ModelGeometry.of(model), args.ratio, args.depth, args.seed)
    config = SFTConfig(bf16=False, report_to="none")
    selector = P2DDataSelector(
        model, tokenizer, heads=heads, target=target, args=config, batch_size=args.batch_size, seed=args.seed
    )
    samples, of_target = (prepare_samples(rows, tokenizer, config) for rows in (pool, target))
    target_batches = [batch for _, batch in of_target.batches(args.batch_size, torch.device("cpu"))]
    bucketed = seen_batches(model, lambda: selector.score(pool))
    unsorted = unsorted_batches(samples, args.batch_size) + target_batches
    decoder = cut_off(model, max(heads.layers))
    forward(decoder, bucketed[-1:])  # warm up

    load_before = load_average()
    seconds = time_rounds(
        {
            "affinity": lambda: selector.score(pool),
            "forward": lambda: forward(decoder, bucketed),
            "unsorted": lambda: forward(decoder, unsorted),
        },
        args.rounds,
        args.seed,
    )

    result = {
        "command": command("selection_cost.py", sys.argv[1:] if argv is None else argv),
        "machine": {**machine(), "load_average_before": load_before, "load_average_after": load_average()},
        "versions": versions(),
        "rows": len(samples),
        "target_rows": len(of_target),
        "tokens": samples.n_tokens,
        "padded_tokens_bucketed": sum(batch["input_ids"].numel() for batch in bucketed),
        "padded_tokens_unsorted": sum(batch["input_ids"].numel() for batch in unsorted),
        "layers": f"{max(heads.layers) + 1} of {model.config.num_hidden_layers}",
        "heads": len(heads),
        "seconds": seconds,
        "ratios": {
            "affinity / forward": median_ratio(seconds["affinity"], seconds["forward"]),
            "unsorted / forward": median_ratio(seconds["unsorted"], seconds["forward"]),
        },
    }
    for name, values in seconds.items():
        print(
            f"{name:10} {statistics.median(values):8.2f} s  {samples.n_tokens / statistics.median(values):8.0f} tokens/s"
        )
    for name, value in result["ratios"].items():
        print(f"{name:20} {value:.3f}")
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
