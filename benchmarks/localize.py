"""
Do the found heads beat random heads? The judge of the localization methods.

    python benchmarks/localize.py --model FOLDER --train train.jsonl --test test.jsonl --output FOLDER
    python benchmarks/localize.py --model FOLDER --train train.jsonl --test test.jsonl --output FOLDER --stability
    python benchmarks/localize.py --output FOLDER --report

The data are JSON lines with the fields `task`, `prompt` and `completion`. An arm is a task, a method, a way to choose
heads by its scores, a share of the heads, a learning rate and a seed. It

1. localizes on `--samples` rows of the task,
2. chooses the heads (`CHOICES`),
3. trains them, and nothing else, on `--rows` rows of the task, of which those samples are the first,
4. evaluates on `--test-rows` held-out rows, the same for all seeds: the negative log-likelihood (NLL) of the answer's
   tokens, the end token among them, and the share of rows whose greedy answer is the right one to the token.

A seed decides which rows are drawn, their order in training, and the random heads, which differ from task to task.
So the arms of one task and seed differ in their heads only, and are compared in pairs. The controls are the method
`random` with the choices `global` (random heads) and `spread` (random heads, evenly over the depth).

The model is loaded once and is the same for all arms: an adapter's deltas go with it, and a checksum says so. Each arm
is one file in `--output`; what is there is not run again, so a run may be stopped at any time. The arms are ordered
such that a partial run is balanced. `--stability` localizes only, with each of `--stability-samples` rows.

Costs are seconds, and for a localization also full steps: its seconds over those of full fine-tuning (forward,
backward, AdamW; batches of the same size) on as many tokens.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from answers import Batch, judge_answers, predictions
from datasets import Dataset, disable_progress_bars
from environment import command, device, load_average, machine, now, versions
from localize_report import ARMS, BASE, FULL_STEP, SCORES, SETTINGS, STABILITY, markdown, summarize
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from p2d_peft import HeadScores, HeadSet, HeadSparseConfig, localize_heads
from p2d_peft.files import read_json, write_json
from p2d_peft.heads.geometry import ROLES, ModelGeometry, base_layer
from p2d_peft.heads.localize import LocalizeMethod
from p2d_peft.selection.samples import Samples, prepare_samples


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from quickstart import fast_dtype


TASKS = ["question_typing", "intent_recognition", "unit_identification", "qasc"]
# batches of similar length are made within so many batches of the shuffled rows
BUCKET = 8
WARMUP = 0.1
# the Trainer's default
MAX_GRADIENT_NORM = 1.0
# what must be the same for all arms in one folder; the rest says which arms
FIXED = ("samples", "rows", "epochs", "test_rows", "batch_size")


LAST_LAYERS, LATE_LAYERS = 0.33, 0.67
CHOICES: dict[str, Callable[[HeadScores, float], HeadSet]] = {
    "global": lambda scores, ratio: scores.top(ratio),
    "spread": lambda scores, ratio: scores.top(ratio, per_layer="even"),
    "groups": lambda scores, ratio: scores.top(ratio, per_group=1),
    "last": lambda scores, ratio: scores.top(ratio, per_layer="even", last_layers=LAST_LAYERS),
    "late": lambda scores, ratio: scores.top(ratio, per_layer="even", last_layers=LATE_LAYERS),
    "late-groups": lambda scores, ratio: scores.top(ratio, per_layer="even", per_group=1, last_layers=LATE_LAYERS),
}


@dataclass(frozen=True)
class Arm:
    task: str
    method: str
    choice: str
    ratio: float
    lr: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}-{self.method}-{self.choice}-{self.ratio:g}-lr{self.lr:g}-seed{self.seed}.json"


def arms(args: argparse.Namespace) -> Iterator[Arm]:
    """The arms in an order of which any first part is balanced."""
    grid = itertools.product(
        args.seeds, sorted(args.ratios, reverse=True), args.tasks, args.methods, args.choices, args.lr
    )
    for seed, ratio, task, method, choice, lr in grid:
        yield Arm(task, method, choice, ratio, lr, seed)


@dataclass(frozen=True)
class Task:
    """The tokenized rows of one task. No test row's prompt is among the training rows."""

    name: str
    train: Samples
    test: Samples

    def drawn(self, seed: int, size: int) -> list[int]:
        """The first `size` training rows in an order that the seed draws: more rows hold all of fewer."""
        if size > len(self.train):
            raise ValueError(f"task '{self.name}' has {len(self.train)} training rows, asked for are {size}")
        return random.Random(f"{self.name} {seed}").sample(range(len(self.train)), len(self.train))[:size]


def read_tasks(args: argparse.Namespace, tokenizer: Any) -> dict[str, Task]:
    """Tokens and labels are those that SFTTrainer makes of conversational prompt-completion rows."""
    rows = {
        split: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for split, path in (("train", args.train), ("test", args.test))
    }
    sft = SFTConfig(bf16=False, report_to="none", max_length=None)
    tasks = {}
    for name in args.tasks:
        test = [row for row in rows["test"] if row["task"] == name][: args.test_rows]
        held_out = {row["prompt"] for row in test}
        train = [row for row in rows["train"] if row["task"] == name and row["prompt"] not in held_out]
        if not train or not test:
            raise ValueError(f"--tasks {name}: no rows of that task in --train or --test")
        samples = [
            prepare_samples(Dataset.from_list([_conversation(row) for row in split]), tokenizer, sft)
            for split in (train, test)
        ]
        tasks[name] = Task(name, *samples)
    return tasks


def _conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def training_order(lengths: list[int], size: int, seed: str) -> list[list[int]]:
    """Batches for one epoch: shuffled, and of similar length within each."""
    generator = random.Random(seed)
    order = generator.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), BUCKET * size):
        bucket = sorted(order[start : start + BUCKET * size], key=lambda row: lengths[row])
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return generator.sample(batches, len(batches))


def checksum(model: nn.Module) -> int:
    """Of the attention weights, which are what an arm touches."""
    value = 0
    for attention in ModelGeometry.of(model).values():
        for role in ROLES:
            weight = base_layer(model.get_submodule(attention.units(role).module)).weight
            value = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy(), value)
    return value


class Judge:
    """The model, the data and the folder that arms share."""

    def __init__(self, args: argparse.Namespace, arguments: list[str]) -> None:
        self.args = args
        self.command = command("localize.py", arguments)
        self.device = device()
        dtype = fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
        self.bf16 = dtype == torch.bfloat16
        self._check_settings(str(dtype).removeprefix("torch."))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.eos = tokenizer.eos_token_id
        self.tasks = read_tasks(args, tokenizer)
        pad = next(iter(self.tasks.values())).train.pad_token_id
        self._collate = DataCollatorForLanguageModeling(pad_token_id=pad)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(self.device).eval()
        self.checksum = checksum(self.model)

    def _check_settings(self, dtype: str) -> None:
        args = self.args
        settings = {
            "model": Path(args.model).name,
            "train_sha256": hashlib.sha256(args.train.read_bytes()).hexdigest(),
            "test_sha256": hashlib.sha256(args.test.read_bytes()).hexdigest(),
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            **{name: getattr(args, name) for name in FIXED},
        }
        path = args.output / SETTINGS
        if path.exists() and (there := read_json(path)) != settings:
            changed = {name: (there.get(name), value) for name, value in settings.items() if there.get(name) != value}
            raise SystemExit(f"--output {args.output} holds arms with other settings (there, here): {changed}")
        write_json(path, settings)

    # -- small things

    def _autocast(self, cache: bool = True) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=cache)

    def _batch(self, samples: Samples, rows: list[int]) -> Batch:
        batch = self._collate([{"input_ids": samples.input_ids[i], "labels": samples.labels[i]} for i in rows])
        return {key: value.to(self.device) for key, value in batch.items()}

    def _in_order(self, samples: Samples, rows: list[int]) -> list[Batch]:
        size = self.args.batch_size
        return [self._batch(samples, rows[start : start + size]) for start in range(0, len(rows), size)]

    # -- the steps of an arm

    def localize(self, task: Task, method: LocalizeMethod, seed: int, n_samples: int) -> HeadScores:
        """The scores, from their file if they were made before."""
        path = self.args.output / SCORES / f"{task.name}-{method}-n{n_samples}-seed{seed}.json"
        if not path.exists():
            batches = self._in_order(task.train, task.drawn(seed, n_samples))
            # Methods may change the weights between forward passes, which autocast's cache would not notice.
            with self._autocast(cache=False):
                scores = localize_heads(self.model, batches, method, seed=zlib.crc32(f"{task.name} {seed}".encode()))
            self._check_untouched()
            dataclasses.replace(scores, model_id=Path(self.args.model).name).save(path)
        return HeadScores.load(path)

    def train(self, model: nn.Module, task: Task, lr: float, seed: int) -> dict[str, float]:
        """Train what requires a gradient; seconds, and the mean loss over the last epoch."""
        model.train()
        samples, rows = task.train, task.drawn(seed, self.args.rows)
        lengths = [len(samples.input_ids[row]) for row in rows]
        epochs = [
            training_order(lengths, self.args.batch_size, f"{task.name} {seed} {epoch}")
            for epoch in range(self.args.epochs)
        ]
        n_steps = sum(map(len, epochs))
        start = now()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * n_steps), n_steps)
        losses: list[float] = []
        for batches in epochs:
            losses = []
            for chosen in batches:
                with self._autocast():
                    logits, labels = predictions(model, self._batch(samples, [rows[i] for i in chosen]))
                    loss = functional.cross_entropy(logits.transpose(1, 2), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return {"seconds": now() - start, "last_epoch_loss": sum(losses) / len(losses)}

    def evaluate(self, model: nn.Module, task: Task) -> dict[str, float]:
        """NLL a token and exact match of the task's held-out rows."""
        model.eval()
        start = now()
        batches = (batch for _, batch in task.test.batches(2 * self.args.batch_size, self.device))
        found = judge_answers(model, batches, self.eos, self._autocast)
        return {"nll": found["nll"], "exact_match": found["exact_match"], "seconds": now() - start}

    def full_step(self, task: Task) -> dict[str, float]:
        """Seconds a token of full fine-tuning on the task's samples, measured once on two batches, on a copy."""
        path = self.args.output / FULL_STEP / f"{task.name}.json"
        if not path.exists():
            batches = self._in_order(task.train, task.drawn(self.args.seeds[0], self.args.samples))
            model = copy.deepcopy(self.model).requires_grad_(True).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

            def step(batch: Batch) -> None:
                with self._autocast():
                    loss = model(**batch, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            step(batches[0])  # warms up and makes the optimizer's state
            timed = batches[1:3] or batches
            start = now()
            for batch in timed:
                step(batch)
            tokens = sum(int(batch["attention_mask"].sum()) for batch in timed)
            write_json(path, {"seconds_per_token": (now() - start) / tokens, "tokens": tokens})
        return read_json(path)

    def base(self, task: Task) -> None:
        """Evaluate the model as it is, once."""
        path = self.args.output / BASE / f"{task.name}.json"
        if not path.exists():
            lengths = {
                "train_tokens_per_row": sum(map(len, task.train.input_ids)) / len(task.train),
                "test_tokens_per_row": sum(map(len, task.test.input_ids)) / len(task.test),
            }
            write_json(path, {"task": task.name, **self.evaluate(self.model, task), **lengths})

    def _check_untouched(self) -> None:
        if checksum(self.model) != self.checksum:
            raise AssertionError("the base model's attention weights are not what they were")

    def run(self, arm: Arm) -> None:
        """Do one arm and write its file."""
        task, n_samples = self.tasks[arm.task], self.args.samples
        self.base(task)
        full_step = self.full_step(task)
        scores = self.localize(task, arm.method, arm.seed, n_samples)
        heads = CHOICES[arm.choice](scores, arm.ratio)
        torch.manual_seed(arm.seed)
        model = get_peft_model(self.model, HeadSparseConfig(heads=heads))
        try:
            n_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            training = self.train(model, task, arm.lr, arm.seed)
            evaluation = self.evaluate(model, task)
        finally:
            self.model = model.unload()
        self._check_untouched()
        tokens = sum(len(task.train.input_ids[row]) for row in task.drawn(arm.seed, n_samples))
        result = {
            **dataclasses.asdict(arm),
            "nll": evaluation["nll"],
            "exact_match": evaluation["exact_match"],
            "last_epoch_loss": training["last_epoch_loss"],
            "localize_seconds": scores.seconds,
            "localize_full_steps": scores.seconds / (full_step["seconds_per_token"] * tokens),
            "train_seconds": training["seconds"],
            "evaluate_seconds": evaluation["seconds"],
            "trainable_parameters": n_trainable,
            "heads": heads.to_dict()["heads"],
            "load_average": load_average(),
            "command": self.command,
            "machine": machine(),
            "versions": versions(),
        }
        write_json(self.args.output / ARMS / arm.file, result)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    arguments = sys.argv[1:] if argv is None else argv
    methods = list(get_args(LocalizeMethod))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the arms' files; it holds no row")
    parser.add_argument("--model", help="folder or Hub id of a causal language model with a chat template")
    parser.add_argument("--train", type=Path, help="JSON lines to localize and train on")
    parser.add_argument("--test", type=Path, help="JSON lines to evaluate on")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--stability", action="store_true", help="localize only, with several numbers of samples")
    mode.add_argument("--report", action="store_true", help="sum up what is in --output, and run nothing")
    parser.add_argument("--summary", type=Path, help="with --report: where to write it, as JSON and beside it as .md")
    parser.add_argument(
        "--no-times", action="store_true", help="with --report: leave out seconds, of runs that shared their device"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="default: all")
    parser.add_argument(
        "--choices", nargs="+", default=["global", "spread"], choices=list(CHOICES), help="default: %(default)s"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.01, 0.03, 0.1], help="default: %(default)s")
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3], help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=100, help="rows to localize on (default: %(default)s)")
    parser.add_argument(
        "--stability-samples", nargs="+", type=int, default=[25, 100, 400], help="default: %(default)s"
    )
    parser.add_argument("--rows", type=int, default=150, help="rows to train on (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=150, help="rows to evaluate on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="bfloat16 is autocast; auto takes it where it is the faster one",
    )
    args = parser.parse_args(argv)
    if args.report:
        summary = summarize(args.output, times=not args.no_times)
        text = markdown(summary)
        print(text)
        if args.summary:
            write_json(args.summary, summary)
            args.summary.with_suffix(".md").write_text(text, encoding="utf-8")
        return summary
    if not (args.model and args.train and args.test):
        parser.error("--model, --train and --test are needed to run anything")

    torch.set_num_threads(args.threads)
    disable_progress_bars()
    judge = Judge(args, arguments)
    if args.stability:
        for seed, name, method, n_samples in itertools.product(
            args.seeds, args.tasks, args.methods, args.stability_samples
        ):
            scores = judge.localize(judge.tasks[name], method, seed, n_samples)
            print(f"{name:24}{method:12} {n_samples:4} samples  seed {seed}  {scores.seconds:7.1f} s", flush=True)
        run = {"command": judge.command, "machine": machine(), "versions": versions()}
        write_json(args.output / STABILITY, run)
        return None
    planned = [arm for arm in arms(args) if not (args.output / ARMS / arm.file).exists()]
    for number, arm in enumerate(planned, 1):
        judge.run(arm)
        result = read_json(args.output / ARMS / arm.file)
        seconds = " ".join(f"{result[f'{part}_seconds']:.1f}" for part in ("localize", "train", "evaluate"))
        print(
            f"{number}/{len(planned)} {arm.file.removesuffix('.json'):64} NLL {result['nll']:.4f}  exact "
            f"{result['exact_match']:.3f}  seconds {seconds}",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
