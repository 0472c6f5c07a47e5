"""
As QLoRA does it: the base in 4 bits, trained weights in full precision. Needs `pip install 'p2d_peft[bitsandbytes]'`.

    python examples/qlora_4bit.py --target my_task.jsonl

Quantized weights have no gradient. A draw of heads, the default, asks for none, and neither does `localize_method="gate"`, which
finds them by what the loss would be without them.
"""

import argparse

import torch
from transformers import BitsAndBytesConfig

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.dataset_files import read_dataset


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
parser.add_argument("--pool", default="trl-lib/Capybara", help="a file, or a name on the Hub with :split")
parser.add_argument("--target", default="trl-lib/Capybara:test", help="a few samples of the task, likewise")
parser.add_argument("--output-dir", default="qlora-4bit")
args = parser.parse_args()

trainer = P2DTrainer(
    model=args.model,
    args=P2DConfig(
        output_dir=args.output_dir,
        model_init_kwargs={"dtype": "bfloat16"},  # of what is not quantized
        reference_steps=0,  # the AER's reference is full fine-tuning, which a quantized model cannot have
        learning_rate=1e-3,
        use_cpu=not torch.accelerator.is_available(),
    ),
    train_dataset=read_dataset(args.pool),
    target_dataset=read_dataset(args.target),
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
)
trainer.train()
trainer.save_model()
print(f"{trainer.report.trainable_parameters:,} weights of {len(trainer.heads)} heads, saved to {args.output_dir}")
