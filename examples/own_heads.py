"""
Heads of your own in the place of localizing: from another paper, another tool, or `p2d heads`.

    p2d heads --model HuggingFaceTB/SmolLM2-135M-Instruct --data my_task.jsonl --method proxy --output heads.json
    python examples/own_heads.py --heads heads.json

Without `--heads` it takes every fourth head of the upper half of the layers, to show how a set is made.
"""

import argparse

import torch
from transformers import AutoConfig

from p2d_peft import HeadSet, HeadSparseConfig, P2DConfig, P2DTrainer
from p2d_peft.dataset_files import read_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--heads", help="what `HeadSet.save` or `p2d heads` wrote")
parser.add_argument("--pool", default="trl-lib/Capybara", help="a file, or a name on the Hub with :split")
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few samples of the task, likewise")
parser.add_argument("--output-dir", default="own-heads")
args = parser.parse_args()

if args.heads:
    heads = HeadSet.load(args.heads)
else:
    config = AutoConfig.from_pretrained(args.model)
    layers = range(config.num_hidden_layers // 2, config.num_hidden_layers)
    heads = HeadSet((layer, head) for layer in layers for head in range(0, config.num_attention_heads, 4))

trainer = P2DTrainer(
    model=args.model,
    args=P2DConfig(
        output_dir=args.output_dir,
        learning_rate=2e-3,
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=read_dataset(args.pool),
    target_dataset=read_dataset(args.target),
    # the rest of the config says what of these heads is trained; all of it without a `peft_config`
    peft_config=HeadSparseConfig(heads=heads, projections=["q", "o"], task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
print(f"trained {trainer.heads!r}, saved to {args.output_dir}")
