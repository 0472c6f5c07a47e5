"""
What a whole run costs on a model of the paper's size: P2DTrainer, and full fine-tuning of as many epochs on the same pool.

    python benchmarks/large_run.py --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --rows 3000 --warmup-rows 40 --estimate

The weights are random, since time and memory do not depend on what they are: nothing follows from it about quality. The
rows are real, GSM8K's by default. Both runs are P2DTrainer's, with the same arguments, in bfloat16; the second one with
`p2d=False`. P2DTrainer first estimates what the second one takes (`reference_steps`), so that the estimate can be seen
beside the measurement. Before both, `--warmup-rows` go through P2D: what a GPU's libraries do when a process first calls
them takes seconds, which whichever came first would be charged with.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from environment import command, load_average, machine, versions
from model_shape import SHAPES, load_model
from transformers import AutoTokenizer

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.files import write_json


TARGET_ROWS = 100
GSM8K = "openai/gsm8k"


def rows(args: argparse.Namespace) -> Dataset:
    """Prompts and completions, shuffled by the seed."""
    name = args.dataset_name or ("main" if args.dataset == GSM8K else None)
    data = load_dataset(args.dataset, name, split="train").shuffle(seed=args.seed)
    data = data.select(range(TARGET_ROWS + args.rows))
    return data.map(
        lambda row: {"prompt": f"{row[args.prompt]}\n", "completion": row[args.completion]},
        remove_columns=data.column_names,
    )


def run(args: argparse.Namespace, data: Dataset, n_rows: int, *, p2d: bool, estimate: bool = False) -> dict[str, Any]:
    """One run on a fresh model with a pool of the first rows, and its report."""
    model = load_model(None, args.shape, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    pool = data.select(range(TARGET_ROWS, TARGET_ROWS + n_rows))
    with tempfile.TemporaryDirectory() as folder:
        config = P2DConfig(
            folder,
            p2d=p2d,
            localize_method="proxy",  # the paper's; the default, a draw, has no cost to be measured
            reference_steps=3 if estimate else 0,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=1e-5,
            max_length=512,
            gradient_checkpointing=False,
            bf16=torch.accelerator.is_available(),
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        )
        target = data.select(range(TARGET_ROWS)) if p2d else None
        trainer = P2DTrainer(model, config, train_dataset=pool, target_dataset=target, processing_class=tokenizer)
        trainer.train()
        report: dict[str, Any] = dataclasses.asdict(trainer.report)
    del trainer, model
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    print(json.dumps({name: report[name] for name in ("stage_seconds", "stage_peak_memory")}), flush=True)
    return report


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", required=True, help="folder or Hub id; its vocabulary is no larger than the shape's"
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="default: %(default)s")
    parser.add_argument("--dataset", default=GSM8K, help="Hub id or folder (default: %(default)s)")
    parser.add_argument("--dataset-name", help="its configuration (default: main, of GSM8K)")
    parser.add_argument("--prompt", default="question", help="the column of the questions (default: %(default)s)")
    parser.add_argument("--completion", default="answer", help="the column of the answers (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=7000, help="rows of the pool (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--warmup-rows", type=int, default=160, help="of those; 0: none (default: %(default)s)")
    parser.add_argument(
        "--estimate", action="store_true", help="leave out full fine-tuning: the AER is that of P2DTrainer's estimate"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args(arguments)

    data = rows(args)
    cold = run(args, data, args.warmup_rows, p2d=True) if args.warmup_rows else None
    ours = run(args, data, args.rows, p2d=True, estimate=True)
    full = None if args.estimate else run(args, data, args.rows, p2d=False)
    reference = None if full is None else sum(full["stage_seconds"].values())
    result = {
        "command": command("large_run.py", arguments),
        "machine": {**machine(), "load_average": load_average()},
        "versions": versions(),
        "shape": SHAPES[args.shape],
        "aer": ours["aer"] if reference is None else sum(ours["stage_seconds"].values()) / reference,
        "estimated_over_measured_reference": reference and ours["reference_seconds"] / reference,
        "cold_stage_seconds": cold and cold["stage_seconds"],
        "p2d": ours,
        "full": full,
    }
    print(json.dumps({name: result[name] for name in ("aer", "estimated_over_measured_reference")}))
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
