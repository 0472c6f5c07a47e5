"""
Cells of a notebook in the style of Unsloth's, for chats in a file of JSON lines: LoRA first, texts by the chat template,
and a loss on the assistant's answers only, for which the trainer's dataset is edited after the trainer is made.

    python examples/drop_in/notebook.py HuggingFaceTB/SmolLM2-135M-Instruct chats.jsonl
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import SFTConfig

from p2d_peft import P2DTrainer as SFTTrainer


# --- the model -------------------------------------------------------------------------------------------------------
model_name, data_file = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = get_peft_model(
    model,
    LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
)

# --- the data --------------------------------------------------------------------------------------------------------
dataset = load_dataset("json", data_files=data_file, split="train")


def formatting_prompts_func(examples):
    return {"text": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in examples["messages"]]}


dataset = dataset.map(formatting_prompts_func, batched=True, remove_columns=dataset.column_names)

# --- the trainer -----------------------------------------------------------------------------------------------------
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
    args=SFTConfig(
        output_dir="outputs",
        dataset_text_field="text",
        max_length=512,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=1,
        max_steps=4,
        learning_rate=2e-4,
        logging_steps=1,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        bf16=torch.accelerator.is_available(),
        report_to="none",
    ),
)


# --- loss on answers only --------------------------------------------------------------------------------------------
def train_on_responses_only(trainer, response_part):
    """Mask all before the last answer."""
    marker = tokenizer(response_part, add_special_tokens=False)["input_ids"]

    def mask(row):
        ids = row["input_ids"]
        starts = [i + len(marker) for i in range(len(ids)) if ids[i : i + len(marker)] == marker]
        start = starts[-1] if starts else len(ids)
        return {"labels": [-100] * start + ids[start:]}

    trainer.train_dataset = trainer.train_dataset.map(mask)
    return trainer


trainer = train_on_responses_only(trainer, sys.argv[3] if len(sys.argv) > 3 else "<|im_start|>assistant\n")
answer = [token for token in trainer.train_dataset[0]["labels"] if token != -100]
print("The first answer:", repr(tokenizer.decode(answer)))

# --- the training ----------------------------------------------------------------------------------------------------
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']:.0f} seconds used for training.")

model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
