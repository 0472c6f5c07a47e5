"""
P2D in a plain SFT script: where `SFTTrainer` stood stands `P2DTrainer`, with a few samples of the task beside the pool.

    python examples/plain_sft.py --target my_task.jsonl
"""

import argparse

import torch

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.dataset_files import read_dataset
from p2d_peft.report.text import report_text


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--pool", default="trl-lib/Capybara", help="a file, or a name on the Hub with :split")
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few samples of the task, likewise")
parser.add_argument("--output-dir", default="plain-sft")
args = parser.parse_args()

trainer = P2DTrainer(
    model=args.model,
    args=P2DConfig(
        output_dir=args.output_dir,
        head_ratio=0.1,
        data_ratio=0.1,
        learning_rate=2e-3,  # heads take a higher one than all weights do
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=read_dataset(args.pool),
    target_dataset=read_dataset(args.target),
)
trainer.train()
trainer.save_model()
print(report_text(trainer.report))
