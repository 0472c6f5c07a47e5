"""What test_many_processes.py starts with `torchrun`: one training, and what came of it, process by process."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from p2d_peft import P2DConfig, P2DTrainer
from p2d_peft.trainer import choosing
from tests.tiny_data import prompt_completion
from tests.tiny_models import tiny_model, tiny_tokenizer


FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}


def main(folder: str, batch_size: int, how: str = "") -> dict:
    rank = os.environ.get("RANK", "0")
    sharded = {"fsdp": True, "fsdp_config": FSDP2} if how == "fsdp2" else {}
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
        **sharded,
    )
    if sharded:
        take_gloo_for_gpus(args)
    trainer = P2DTrainer(
        tiny_model(),
        args,
        train_dataset=prompt_completion(32),
        target_dataset=prompt_completion(6, seed=1),
        processing_class=tiny_tokenizer(),
    )
    if how == f"{rank} fails":
        choosing.localize_heads = fail
    trainer.train()
    trainer.save_model()
    if sharded:
        assert trainer.is_fsdp_enabled and any(isinstance(p, DTensor) for p in trainer.model.parameters())
    whole = {name: p.full_tensor() if sharded else p for name, p in trainer.model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in whole.items() if "head_sparse" in name}
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


def take_gloo_for_gpus(args: P2DConfig) -> None:
    """Where there are CPUs only, Accelerate leaves FSDP out without a word. It does not look again."""
    assert args.device.type == "cpu"  # by which the processes have found one another
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no heads on this rank")


if __name__ == "__main__":
    main(sys.argv[1], 2, *sys.argv[2:])
    torch.distributed.destroy_process_group()
