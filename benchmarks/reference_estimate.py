"""
How good is the estimate of AER's reference? The estimated epoch of full fine-tuning beside a measured stretch of it.

    python benchmarks/reference_estimate.py --model FOLDER_OR_ID --output results.json

The estimate is P2DTrainer's own, from three steps; the measurement is SFTTrainer with the same arguments for `--steps`
steps on the same pool, the quickstart's, without the first two steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.report.run_report import library_versions
from p2d_peft.trainer.reference import count_tokens, find_reference


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from quickstart_data import build_pool


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    data = build_pool(seed=0)

    with tempfile.TemporaryDirectory() as folder:

        def setup() -> dict:
            return {
                "model": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
                "processing_class": AutoTokenizer.from_pretrained(args.model),
                "train_dataset": data["pool"],
            }

        def config(**changes: object) -> P2DConfig:
            return P2DConfig(
                folder,
                per_device_train_batch_size=8,
                max_length=256,
                gradient_checkpointing=False,
                bf16=True,
                use_cpu=not torch.accelerator.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
                **changes,
            )

        trainer = P2DTrainer(args=config(reference_steps=3), target_dataset=data["target"], **setup())
        pool = trainer.train_dataset
        reference = find_reference(trainer, pool, len(pool), count_tokens(pool, trainer.args), epochs=1.0)
        assert reference is not None
        del trainer, pool
        times = StepTimes()
        SFTTrainer(args=config(p2d=False, max_steps=args.steps), callbacks=[times], **setup()).train()

    step = sum(times.seconds[2:]) / len(times.seconds[2:])
    result = {
        "command": f"python benchmarks/reference_estimate.py --model {Path(args.model).name} --steps {args.steps}",
        "versions": library_versions(),
        "cpu_threads": torch.get_num_threads(),
        "estimated_seconds_per_epoch": reference.seconds_per_epoch,
        "estimated_relative_error": reference.relative_error,
        "measured_step_seconds": times.seconds,
        "measured_seconds_per_epoch": step * len(data["pool"]) / 8,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
