"""
A QLoRA tutorial: a base in 4 bits, LoRA on all its linear layers, 8-bit AdamW, and a merge at the end.

    python examples/drop_in/qlora.py HuggingFaceTB/SmolLM2-135M-Instruct chats.jsonl
"""

import sys

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from p2d_peft import P2DTrainer as SFTTrainer


model_name, data_file = sys.argv[1:3]

# 1. the quantized base
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16 if torch.accelerator.is_available() else torch.float32,
)
model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=quantization)
model.config.use_cache = False
model = prepare_model_for_kbit_training(model)
tokenizer = AutoTokenizer.from_pretrained(model_name)

# 2. the adapter
peft_config = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
)

# 3. the training
args = SFTConfig(
    output_dir="qlora",
    num_train_epochs=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
    optim="adamw_8bit",
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    max_grad_norm=0.3,
    max_length=512,
    logging_steps=1,
    save_strategy="epoch",
    bf16=torch.accelerator.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("json", data_files=data_file, split="train"),
    processing_class=tokenizer,
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()

# 4. the merge, into a base in full precision
merged = AutoPeftModelForCausalLM.from_pretrained("qlora", dtype=torch.float32).merge_and_unload()
merged.save_pretrained("qlora-merged")
tokenizer.save_pretrained("qlora-merged")
