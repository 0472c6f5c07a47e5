"""
Many small runs in one process: does anything grow that should not?

    python scripts/soak.py --cycles 200 --output benchmarks/results/soak.json
    python scripts/soak.py --cycles 1     # one run from a model to a loaded adapter: is an installation complete?

Each cycle is what a user's script does with tiny models: localize, select, train with `P2DTrainer`, save, load into a
fresh model and merge. Beside it one model lives through all cycles, is localized on, selected with, and has an adapter
put on and taken off: hooks that are left behind gather there. Methods and scorers take turns. After each cycle, with
the garbage collected, what the process holds is counted. The first tenth of the cycles is a warm-up, in which libraries
fill their caches; after it there must be as many hooks, open files, tensors, threads and temporary files as at its end,
and memory must not grow by more than `--most-memory` kB a cycle.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

import p2d_peft
from p2d_peft import HeadSet, HeadSparseConfig, P2DConfig, P2DDataSelector, P2DTrainer, localize_heads
from p2d_peft.files import write_json
from p2d_peft.report import P2DReport
from p2d_peft.report.run_report import REPORT_NAME, library_versions


# The tests' folder, not the checkout's root: that would hide the installation that is to be looked at.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_data import prompt_completion
from tiny_models import random_batch, tiny_model, tiny_tokenizer


METHODS = ("proxy", "taylor", "gate", "fisher", "gain", "ablation", "random")
SCORERS = ("affinity", "icl", "influence", "gradient", "rds", "ifd", "perplexity", "random")
COUNTS = ("hooks", "open_files", "tensors", "threads", "temporary_files")


def cycle(index: int, folder: Path, resident: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """One run from a model to a merged adapter, and the same steps one by one on the model that stays."""
    method, scorer = METHODS[index % len(METHODS)], SCORERS[index % len(SCORERS)]
    pool, target = prompt_completion(16, seed=index), prompt_completion(4, seed=index + 1)
    trainer = P2DTrainer(
        tiny_model(),
        P2DConfig(
            str(folder / "run"),
            localize_method=method,
            scorer=scorer,
            head_ratio=0.25,
            data_ratio=0.5,
            reference_steps=1,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pool,
        target_dataset=target,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    assert P2DReport.load(folder / "run" / REPORT_NAME).aer > 0

    batch = random_batch()
    inputs = {"input_ids": batch["input_ids"]}  # with labels, TRL's chunked loss gives no logits
    with torch.no_grad():
        trained = trainer.model.eval()(**inputs).logits
        loaded = PeftModel.from_pretrained(tiny_model(), folder / "run").eval()
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(**inputs).logits, trained, atol=1e-4)
        assert not torch.allclose(resident(**inputs).logits, trained, atol=1e-4)

    scores = localize_heads(resident, [batch], method=method)
    scores.top(0.25).save(folder / "heads.json")
    heads = HeadSet.load(folder / "heads.json")
    selector = P2DDataSelector(
        resident, tokenizer, heads, target, scorer=scorer, ratio=0.5, cache_dir=folder / "scores"
    )
    assert len(selector.select(pool)) == 8
    assert get_peft_model(resident, HeadSparseConfig(heads=heads)).unload() is resident


def held(folder: Path, resident: nn.Module) -> dict[str, int]:
    """What the process holds: hooks on the model that stays, open files, tensors, threads, temporary files, memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept for later is no growth
    process = psutil.Process()
    hooks = sum(
        len(hooks)
        for module in resident.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and hooks is not None
    )
    return {
        "hooks": hooks,
        "open_files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "tensors": sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()),
        "threads": threading.active_count(),
        "temporary_files": len(os.listdir(folder)),
        "memory_kb": process.memory_info().rss // 1024,
    }


def slope(values: list[int]) -> float:
    """By how much the values grow a cycle, by the line of least squares."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0


def summary(taken: list[dict[str, int]], most_memory: float) -> dict[str, Any]:
    """
    What grew after the warm-up.

    Args:
        taken (`list[dict[str, int]]`): What [`held`] gave after each cycle.
        most_memory (`float`): The growth of memory, in kB a cycle, that is still none.
    """
    steady = taken[len(taken) // 10 :]
    grown = [
        name for name in COUNTS if steady[-1][name] > steady[0][name] and slope([one[name] for one in steady]) > 0
    ]
    memory = slope([one["memory_kb"] for one in steady])
    if memory > most_memory:
        grown.append("memory_kb")
    return {
        "cycles": len(taken),
        "warm_up": len(taken) // 10,
        "after_first_cycle": taken[0],
        "after_warm_up": steady[0],
        "at_the_end": steady[-1],
        "memory_kb_a_cycle": round(memory, 2),
        "grown": grown,
    }


def main(arguments: list[str] | None = None) -> int:
    """
    Run the cycles.

    Returns:
        `int`: 0, or 1 if something grew.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--most-memory", type=float, default=10.0, help="growth in kB a cycle that counts as none")
    parser.add_argument("--output", type=Path, help="write the numbers to this file as JSON")
    args = parser.parse_args(arguments)
    if args.cycles < 1:
        parser.error(f"--cycles must be at least 1, got {args.cycles}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # one tokenizer for all: tokenizers 0.23 keeps some kB of each that was ever used (benchmarks/README.md)
    resident, tokenizer, taken = tiny_model(seed=1), tiny_tokenizer(), []
    with tempfile.TemporaryDirectory() as name:
        # also the files that libraries put where temporary ones go
        tempfile.tempdir, before = name, tempfile.gettempdir()
        try:
            for index in range(args.cycles):
                cycle(index, Path(name), resident, tokenizer)
                taken.append(held(Path(name), resident))
                if not index:
                    gc.freeze()  # the libraries' own objects, now that all is imported: counting them takes most time
                print(index + 1, *(f"{key}={value}" for key, value in taken[-1].items()), flush=True)
        finally:
            tempfile.tempdir = before
    result = {
        "command": f"python scripts/soak.py --cycles {args.cycles}",
        **summary(taken, args.most_memory),
        "memory_kb": [one["memory_kb"] for one in taken],
        "versions": {**library_versions(), "p2d_peft": p2d_peft.__version__},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "memory_kb"}, indent=2))
    if args.output:
        write_json(args.output, result)
    return 1 if result["grown"] else 0


if __name__ == "__main__":
    sys.exit(main())
