"""
Chats of which only the assistant's turns count: in the loss, and so in localizing and in selecting.

    python examples/chat_assistant_only.py --pool chats.jsonl --target my_chats.jsonl

The chat template has to mark the assistant's turns with {% generation %}; for the templates of many models (Qwen, Llama,
Gemma and others) TRL puts the marks in itself.
"""

import argparse

import torch

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.dataset_files import read_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument(
    "--pool", default="trl-lib/Capybara", help="rows with `messages`: a file, or a Hub name with :split"
)
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few chats of the task, likewise")
parser.add_argument("--output-dir", default="chat-assistant-only")
args = parser.parse_args()

trainer = P2DTrainer(
    model=args.model,
    args=P2DConfig(
        output_dir=args.output_dir,
        assistant_only_loss=True,
        max_length=2048,
        learning_rate=1e-3,
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=read_dataset(args.pool),
    target_dataset=read_dataset(args.target),
)
trainer.train()
trainer.save_model()
row = trainer.train_dataset[0]
learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
print("of the first selected chat this is learned:", trainer.processing_class.decode(learned))
