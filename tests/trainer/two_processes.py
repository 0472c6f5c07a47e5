"""What test_many_processes.py starts with `torchrun`: one training, and what came of it, process by process."""

import importlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from p2d_peft import HeadSet, P2DConfig, P2DTrainer
from p2d_peft.trainer import choosing
from tests.tiny_data import prompt_completion
from tests.tiny_models import tiny_model, tiny_tokenizer


FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
SHARDS = {**FSDP2, "state_dict_type": "SHARDED_STATE_DICT"}  # Accelerate's default
# ZeRO-3 spreads the model as it is loaded, so heads and rows are chosen before.
GIVEN = HeadSet([(0, 1), (1, 1), (2, 0)])


def deepspeed(stage: int) -> dict:
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # stage 3: of all weights, however small; and to save them
    stage3 = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": {"stage": stage, **stage3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(sizes, "auto"),
    }


def main(folder: str, batch_size: int, how: str = "", is_chosen: bool = False) -> dict:
    rank = os.environ.get("RANK", "0")
    is_chosen = is_chosen or how == "zero3"
    model = tiny_model()
    if how == "zero3":  # from where it is loaded once there are arguments that say so
        model.save_pretrained(f"{folder}-{rank}")
        model = f"{folder}-{rank}"
    is_sharded = how.startswith("fsdp2")
    sharded = {"fsdp": True, "fsdp_config": SHARDS if "shards" in how else FSDP2} if is_sharded else {}
    if how.startswith("zero"):
        take_gloo_for_gpus_of_deepspeed()
        options = {"deepspeed": deepspeed(int(how[-1]))}
    else:
        options = {"use_cpu": True, **sharded}
    args = P2DConfig(
        folder,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4,
        localize_method="taylor",
        data_ratio=1.0 if is_chosen else 0.5,
        head_ratio=0.25,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        save_strategy="epoch",
        gradient_checkpointing=False,
        reference_steps=1,
        **options,
    )
    if sharded:
        take_gloo_for_gpus(args)
    trainer = P2DTrainer(
        model,
        args,
        train_dataset=prompt_completion(32),
        target_dataset=prompt_completion(6, seed=1),
        processing_class=tiny_tokenizer(),
        heads=GIVEN if is_chosen else None,
    )
    if how == f"{rank} fails":
        choosing.localize_heads = fail
    trainer.train(resume_from_checkpoint=how.partition("resumed from ")[2] or None)
    if "shards" in how:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if sharded:
        assert trainer.is_fsdp_enabled and any(isinstance(p, DTensor) for p in trainer.model.parameters())
    trained = {name: p for name, p in trainer.model.named_parameters() if "head_sparse" in name}
    with gathered(trained.values()) if how == "zero3" else nullcontext():
        whole = {name: p.full_tensor() if sharded else p for name, p in trained.items()}
        weights = {name: p.detach().clone() for name, p in whole.items()}
    save_file(weights, Path(folder, f"rank{rank}.safetensors"))
    result = {
        "heads": trainer.heads.to_dict(),
        "rows": trainer._p2d_state.rows,
        "scores": trainer._p2d_state.scores,
        "stages": sorted(trainer.report.stage_seconds),
        "trained_tokens": trainer.report.stage_tokens["train"],
        "parameters": [trainer.report.trainable_parameters, trainer.report.total_parameters],
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps({**result, "processes": trainer.accelerator.num_processes}))
    return result


def take_gloo_for_gpus(args: P2DConfig) -> None:
    """Where there are CPUs only, Accelerate leaves FSDP out without a word. It does not look again."""
    assert args.device.type == "cpu"  # by which the processes have found one another
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def take_gloo_for_gpus_of_deepspeed() -> None:
    """Where there are CPUs only, Accelerate has DeepSpeed's processes find one another and takes them for one."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    importlib.import_module("deepspeed")
    # a kernel for shared memory that would be compiled for minutes
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def gathered(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager:
    return importlib.import_module("deepspeed").zero.GatheredParameters(list(parameters))


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no heads on this rank")


if __name__ == "__main__":
    main(sys.argv[1], 2, *sys.argv[2:])
    torch.distributed.destroy_process_group()
