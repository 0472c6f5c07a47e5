"""What test_many_processes.py starts with `torchrun`: one training, and what came of it, process by process."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.trainer import choosing
from tests.tiny_data import prompt_completion
from tests.tiny_models import tiny_model, tiny_tokenizer


def main(folder: str, batch_size: int, failing_rank: str | None = None) -> dict:
    rank = os.environ.get("RANK", "0")
    args = P2DConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4,
        localize_method="taylor",
        data_ratio=0.5,
        head_ratio=0.25,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        save_strategy="epoch",
        gradient_checkpointing=False,
        reference_steps=1,
    )
    trainer = P2DTrainer(
        tiny_model(),
        args,
        train_dataset=prompt_completion(32),
        target_dataset=prompt_completion(6, seed=1),
        processing_class=tiny_tokenizer(),
    )
    if rank == failing_rank:
        choosing.localize_heads = fail
    trainer.train()
    trainer.save_model()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "head_sparse" in name}
    save_file(weights, Path(folder, f"rank{rank}.safetensors"))
    result = {
        "heads": trainer.heads.to_dict(),
        "rows": trainer._p2d_state.rows,
        "scores": trainer._p2d_state.scores,
        "stages": sorted(trainer.report.stage_seconds),
        "trained_tokens": trainer.report.stage_tokens["train"],
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps({**result, "processes": trainer.accelerator.num_processes}))
    return result


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no heads on this rank")


if __name__ == "__main__":
    main(sys.argv[1], 2, *sys.argv[2:])
    torch.distributed.destroy_process_group()
