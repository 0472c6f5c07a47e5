"""
A pool that need not fit on the disk: it is streamed twice, once to score its rows and once to pick those that are kept.

    python examples/streaming_pool.py --rows 20000 --target my_task.jsonl
"""

import argparse

import torch

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.dataset_files import read_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--pool", default="trl-lib/Capybara", help="a file, or a name on the Hub with :split")
parser.add_argument("--rows", type=int, default=10_000, help="how many rows of the stream to look at (%(default)s)")
parser.add_argument("--steps", type=int, default=200, help="of training; a stream has no length, so no epochs")
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few samples of the task, likewise")
parser.add_argument("--output-dir", default="streaming-pool")
args = parser.parse_args()

trainer = P2DTrainer(
    model=args.model,
    args=P2DConfig(
        output_dir=args.output_dir,
        data_ratio=0.05,
        max_steps=args.steps,
        learning_rate=2e-3,
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=read_dataset(args.pool, streaming=True).take(args.rows),
    target_dataset=read_dataset(args.target),
)
trainer.train()
trainer.save_model()
report = trainer.report
print(f"{report.selected_rows} of {report.pool_rows} rows of the stream, saved to {args.output_dir}")
