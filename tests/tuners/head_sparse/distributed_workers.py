"""What the two processes of test_distributed.py run, and what one process does instead."""

import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from p2d_peft.heads import ModelGeometry
from p2d_peft.tuners import HeadSparseConfig
from tests.tiny_models import LAYOUTS, random_batch, tiny_model


WORLD = 2
HEADS = {0: [1], 1: [0, 2]}
STEPS = 3
Case = tuple[str, dict]

# Llama: 12 and 24 rows or columns a slice. GPT-2 of three heads of one feature each: a fused projection whose slices
# have 1 to 9 rows, and (3, 1) and (3, 2) columns, fewer than there are processes or no multiple of that.
CASES: dict[str, Case] = {
    "llama": ("llama", {}),
    "llama, r=1": ("llama", {"r": 1}),
    "llama, r=3": ("llama", {"r": 3}),
    "gpt2": ("gpt2", {}),
    "gpt2, one row": ("gpt2", {"projections": ["v"]}),
}


def base_model(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    if name == "gpt2":
        transformers.set_seed(0)
        config = transformers.GPT2Config(**{**LAYOUTS["gpt2"].changes, "n_embd": 3, "n_head": 3})
        # without dropout
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return tiny_model(name, dtype)


def adapted(case: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    name, fields = CASES[case]
    model = base_model(name, dtype)
    torch.manual_seed(1)  # the low-rank factors are drawn
    return get_peft_model(model, HeadSparseConfig(heads=HEADS, init_weights=False, **fields)).eval()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, rank: int | None = None) -> nn.Module:
    """A few steps on a batch, or on the share of one process."""
    batch = random_batch(rows=2 * WORLD)
    if rank is not None:
        batch = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a sharded model, on rank 0."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def ddp(rank: int, case: str) -> dict[str, Any]:
    model = adapted(case)
    wrapped = DistributedDataParallel(model)
    sent = [0]

    def hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += bucket.buffer().numel()
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    train(wrapped, rank)
    return {"trained": trained(model), "sent": sent[0], "buffers": [name for name, _ in model.named_buffers()]}


def shard(model: PeftModel | transformers.PreTrainedModel) -> None:
    """Each decoder layer, then the rest, as users of `fully_shard` do."""
    for module in model.modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "GPT2Block"):
            fully_shard(module)
    fully_shard(model)


def fsdp2(rank: int, case: str, folder: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    model = adapted(case, dtype)
    heads = ModelGeometry.of(model).heads
    shard(model)
    assert ModelGeometry.of(model).heads == heads
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in parameters)
    train(model, rank)
    weights = full(model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=weights)
    return {"local": [p.to_local().numel() for p in parameters], "dtypes": {p.dtype for p in parameters}}


def attach_to_shards(rank: int, name: str) -> dict[str, tuple[int, ...]]:
    model = base_model(name)
    shard(model)
    model = get_peft_model(model, HeadSparseConfig(heads=HEADS))
    model(**random_batch())
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def fsdp2_by_accelerate(rank: int, case: str, folder: str, ram_efficient: bool, peft_policy: bool) -> None:
    """As `Accelerator.prepare` and transformers' Trainer do. (Accelerate itself does not choose FSDP on a CPU.)"""
    model = adapted(case, torch.bfloat16)
    if ram_efficient and rank:
        # what from_pretrained leaves on the other ranks
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=ram_efficient
    )
    if peft_policy:
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    model = fsdp2_prepare_model(accelerator, model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, rank)
    weights = full(model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=weights)


def wrapped_in_fsdp1(model: PeftModel, use_orig_params: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def fsdp1(rank: int, case: str, dtype: torch.dtype, use_orig_params: bool) -> dict[str, Any]:
    wrapped = wrapped_in_fsdp1(adapted(case, dtype), use_orig_params)
    train(wrapped, rank)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in wrapped.named_parameters()
            if ".head_sparse_" in name
        }


def fsdp1_loads_what_it_saved(rank: int, case: str, use_orig_params: bool) -> dict[str, torch.Tensor]:
    """What is in the model after it loaded twice what was in it."""
    wrapped = wrapped_in_fsdp1(adapted(case), use_orig_params)
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        wrapped.load_state_dict({name: 2 * tensor for name, tensor in wrapped.state_dict().items()})
        return {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}


def tensor_parallel(rank: int, folder: str) -> str:
    config = DistributedConfig(tp_size=WORLD)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    try:
        get_peft_model(model, HeadSparseConfig(heads=HEADS))
    except ValueError as error:
        return str(error)
    return "attached"


def zero3(rank: int, case: str, folder: str) -> dict[str, torch.Tensor]:
    """On a base that transformers loads under `zero.Init`, as with Trainer: no rank ever holds all of a weight."""
    import deepspeed
    from deepspeed.comm import comm
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # a kernel for shared memory that would be compiled for minutes
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    comm.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        # shard all weights, however small
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    alive = HfDeepSpeedConfig(config)  # transformers holds a weak reference to it
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    unset_hf_deepspeed_config()
    del alive
    assert not any(parameter.numel() for parameter in base.parameters())
    torch.manual_seed(1)
    model = get_peft_model(base, HeadSparseConfig(heads=HEADS, init_weights=False, **CASES[case][1])).eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.3, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    batch = {key: value[2 * rank : 2 * rank + 2] for key, value in random_batch(rows=2 * WORLD).items()}
    engine.eval()
    for _ in range(STEPS):
        engine.backward(engine(**batch).loss)
        engine.step()
    assert not any(parameter.numel() for parameter in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return trained(model)


def _start(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)


class Both:
    """Two processes that form a group. A call runs a function in both, with the rank as its first argument."""

    def __init__(self, store: str) -> None:
        context = get_context("spawn")
        self.pools = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(rank, store))
            for rank in range(WORLD)
        ]

    def __call__(self, function: Callable, *args: Any) -> list[Any]:
        futures = [pool.submit(function, rank, *args) for rank, pool in enumerate(self.pools)]
        return [future.result(timeout=120) for future in futures]

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)
