"""
Only the data side: find the heads, let them select, and train as you always do, here with TRL's `SFTTrainer` and LoRA.

    python examples/select_only.py --target my_task.jsonl

`p2d heads` and `p2d select` do the first half on the command line and write the rows to a file for any trainer.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from p2d_peft import P2DDataSelector, localize_heads
from p2d_peft.dataset_files import read_dataset
from p2d_peft.selection.policies import RoundRobin
from p2d_peft.selection.samples import prepare_samples


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--pool", default="trl-lib/Capybara", help="a file, or a name on the Hub with :split")
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few samples of the task, likewise")
parser.add_argument("--output-dir", default="select-only")
args = parser.parse_args()

sft_args = SFTConfig(args.output_dir, learning_rate=2e-4, use_cpu=not torch.accelerator.is_available())
device = sft_args.device
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
pool, target = read_dataset(args.pool), read_dataset(args.target)

# tokenized as the training will do it, which `sft_args` says
samples = prepare_samples(target, tokenizer, sft_args, name="target")
batches = [batch for _, batch in samples.batches(8, device)]
# of the first layers: the pass that scores a row ends above them
# or, which was as good and is free: localize_heads(model, [], method="random")
scores = localize_heads(model, batches, method="proxy")
heads = scores.top(0.1, per_layer="even", first_layers=0.2)
selector = P2DDataSelector(
    model, tokenizer, heads=heads, target=target, args=sft_args, ratio=0.1, policies=[RoundRobin()]
)
selected = selector.select(pool)
print(f"{len(selected)} of {len(pool)} rows by {heads!r}")

trainer = SFTTrainer(
    model=model,  # as it was: both steps leave no trace
    args=sft_args,
    train_dataset=selected,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
