"""The weights to train: everything, or an adapter; and the training, the same for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from answers import predictions
from datasets import Dataset
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from p2d_peft import HeadSet, HeadSparseConfig

from .profile import OF_HEADS, Training


RANK = 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapter_config(adapter: str, heads: HeadSet | None, seed: int) -> PeftConfig | None:
    """The adapter of one of `profile.ADAPTERS`; None is full fine-tuning."""
    if adapter == "full":
        return None
    if adapter in OF_HEADS:
        return HeadSparseConfig(heads=heads, share_kv=adapter == "heads", task_type="CAUSAL_LM")
    if adapter == "shira":
        return ShiraConfig(r=RANK, target_modules=ATTENTION, random_seed=seed, task_type="CAUSAL_LM")
    modules = ATTENTION if adapter == "lora-attention" else "all-linear"
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules, task_type="CAUSAL_LM")


def with_adapter(model: nn.Module, config: PeftConfig | None) -> nn.Module:
    """The model with the adapter, or with all of its weights trainable."""
    if config is None:
        return model.requires_grad_(True)
    return get_peft_model(model, config)


class AnswerTrainer(SFTTrainer):
    """
    `SFTTrainer` with a cheaper way to the same loss: the LM head runs on the answers' tokens only.

    SFTTrainer runs it on the prompts', too, whose labels are masked. On a CPU that is a third of an arm's time.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, labels = predictions(model, inputs)
        loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        counted = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return (loss / counted, logits) if return_outputs else loss / counted


def training_arguments(
    training: Training, folder: Path, *, epochs: int, lr: float, seed: int, bf16: bool, on_cpu: bool
) -> SFTConfig:
    """What all arms train with; what is not named here has SFTConfig's default."""
    return SFTConfig(
        str(folder),
        num_train_epochs=epochs,
        learning_rate=lr,
        warmup_steps=0.1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_length=training.max_length,
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=training.activation_checkpointing,  # its name in all versions of transformers
        bf16=bf16,
        use_cpu=on_cpu,
        seed=seed,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )


def train(model: nn.Module, tokenizer: Any, rows: Dataset, arguments: SFTConfig) -> dict[str, Any]:
    """Train what requires a gradient; the losses of the epochs and the number of steps."""
    trainer = AnswerTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "steps": trainer.state.global_step}


def trained_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def checkpoint_bytes(model: nn.Module, folder: Path) -> int:
    """The size of the weights that are to be kept: the adapter's file, or all of the model's weights."""
    if not hasattr(model, "peft_config"):
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(str(folder))
    size = (folder / "adapter_model.safetensors").stat().st_size
    for file in folder.iterdir():
        file.unlink()
    return size


def on_cpu() -> bool:
    """Whether there is no accelerator."""
    return not torch.accelerator.is_available()
