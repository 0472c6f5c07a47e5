"""
What a training step of HeadSparse costs: time, memory, checkpoint; next to LoRA, SHiRA, full fine-tuning and the floor.

    python benchmarks/head_sparse_step.py --model FOLDER --output benchmarks/results/head_sparse_step.json

All arms run in one process and take turns: each round times one step of each, in an order drawn anew. A ratio of two
arms is the median over the rounds of their ratio within a round, so what else the machine does falls on both alike.

The arms of a step (forward, backward, AdamW) train

- `head_sparse_anywhere`: 10 % of the heads, drawn from all layers;
- `head_sparse_top_third`: as many heads, drawn from the top third of the layers;
- `head_sparse_qo_*`: the same heads without their groups' keys and values (`share_kv=False`);
- `lora_r16`, `shira_r16`: q, k, v and o of all layers, r = 16;
- `lora_matched_*`: LoRA with as many trained weights as the HeadSparse arm of that name (rounded down to a whole r),
  on all layers or on the top third;
- `full`: all weights.

The arms `floor_*` train nothing. They are what any method must do that trains weights in the lowest adapted layer: the
frozen model's forward, and the backward from the loss to that layer's input, which is made a leaf that requires a
gradient. No weight's gradient is computed, and no optimizer runs.

Memory is counted in bytes of tensors, since the process's own size says little: allocators keep what was freed, and
the arms share it. For each arm, over one step after the optimizer has its state:

- `peak_bytes`: the most bytes alive at once that are not the frozen base model's weights: trained weights of an
  adapter, gradients, optimizer state, activations and temporary results;
- `saved_bytes`: what the forward keeps for the backward, weights not counted, and `saved_bytes_below` the share of the
  embeddings and of the layers below the lowest adapted one;
- `weight_copies`: results with the shape of a frozen attention projection's weight, that is copies of it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import sys
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from environment import command, load_average, machine, now, versions
from model_shape import SHAPES, load_model
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.files import write_json
from p2d_peft.heads.geometry import ROLES, ModelGeometry


@dataclass
class Arm:
    """One way to do a step, on a model of its own that may share its frozen weights with others."""

    name: str
    model: nn.Module
    # the lowest layer that the backward reaches
    lowest: int
    optimizer: torch.optim.Optimizer | None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def layer_names(base: nn.Module) -> dict[int, str]:
    """The full name of each layer with attention, by its number."""
    return {layer: attention.name.rpartition(".")[0] for layer, attention in ModelGeometry.of(base).items()}


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a model around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def adapted(name: str, base: nn.Module, config: peft.PeftConfig, lowest: int) -> Arm:
    model = get_peft_model(sharing_weights(base), config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Arm(name, model, lowest, torch.optim.AdamW(trained, lr=1e-4, fused=True))


def floor(name: str, base: nn.Module, lowest: int) -> Arm:
    model = sharing_weights(base).train()

    def require_grad(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].requires_grad_()  # a leaf, as nothing below it does: this costs nothing

    model.get_submodule(layer_names(model)[lowest]).register_forward_pre_hook(require_grad)
    return Arm(name, model, lowest, None)


def full(base: nn.Module) -> Arm:
    """The arm that trains all weights, which are its own."""
    model = copy.deepcopy(base).requires_grad_(True).train()
    return Arm("full", model, 0, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))


def makers(base: nn.Module, heads: dict[str, HeadSet], r: int) -> dict[str, Callable[[], Arm]]:
    """What makes each arm, by its name; those that train less than all weights share those of `base`."""
    geometry = ModelGeometry.of(base)
    targets = list(dict.fromkeys(attention.units(role).module for attention in geometry.values() for role in ROLES))

    def head_sparse(name: str, chosen: HeadSet, **options: Any) -> Arm:
        return adapted(name, base, HeadSparseConfig(heads=chosen, **options), min(chosen.layers))

    def matched_lora(name: str, where: str) -> Arm:
        lowest = min(heads[where].layers)
        n_trained = sum(parameter.numel() for parameter in head_sparse("", heads[where]).trained)
        in_reach = [name for name in targets if where == "anywhere" or _layer_of(geometry, name) >= lowest]
        a_rank = sum(sum(base.get_submodule(name).weight.shape) for name in in_reach)
        r = max(1, n_trained // a_rank)
        config = LoraConfig(r=r, lora_alpha=r, target_modules=in_reach)
        return adapted(name, base, config, _layer_of(geometry, in_reach[0]))

    lora = LoraConfig(r=r, lora_alpha=r, target_modules=targets)
    shira = ShiraConfig(r=r, random_seed=0, target_modules=targets)
    found: dict[str, Callable[[], Arm]] = {"full": partial(full, base)}
    for where, chosen in heads.items():
        found[f"floor_{where}"] = partial(floor, f"floor_{where}", base, min(chosen.layers))
        found[f"head_sparse_{where}"] = partial(head_sparse, f"head_sparse_{where}", chosen)
        found[f"head_sparse_qo_{where}"] = partial(head_sparse, f"head_sparse_qo_{where}", chosen, share_kv=False)
        found[f"lora_matched_{where}"] = partial(matched_lora, f"lora_matched_{where}", where)
    found[f"lora_r{r}"] = partial(adapted, f"lora_r{r}", base, lora, 0)
    found[f"shira_r{r}"] = partial(adapted, f"shira_r{r}", base, shira, 0)
    return found


def _layer_of(geometry: ModelGeometry, projection: str) -> int:
    return next(
        layer for layer, attention in geometry.items() for role in ROLES if attention.units(role).module == projection
    )


def choose_heads(geometry: ModelGeometry, ratio: float, seed: int) -> dict[str, HeadSet]:
    """The heads of the two HeadSparse arms, drawn at random; their number is the same."""
    everywhere = sorted(geometry.heads)
    layers = sorted(geometry)
    top = set(layers[-max(1, len(layers) // 3) :])
    n = max(1, round(ratio * len(everywhere)))
    generator = random.Random(seed)
    return {
        "anywhere": HeadSet(generator.sample(everywhere, n)),
        "top_third": HeadSet(generator.sample([head for head in everywhere if head.layer in top], n)),
    }


def time_rounds(
    arms: list[Arm], batch: dict[str, torch.Tensor], rounds: int, warmup: int, seed: int
) -> dict[str, list]:
    """Seconds of one step of each arm in each round; on an accelerator, until it is done."""
    seconds: dict[str, list[float]] = defaultdict(list)
    generator = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            for arm in generator.sample(arms, len(arms)):
                start = now()
                arm.step(batch)
                if number >= warmup:
                    seconds[arm.name].append(now() - start)
            gc.collect()
    finally:
        gc.enable()
    return {arm.name: seconds[arm.name] for arm in arms}


class AliveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, as long as they live."""

    def __init__(self, known: list[torch.Tensor], alive: int) -> None:
        super().__init__()
        self.alive = self.peak = alive
        self.shapes: dict[tuple[int, ...], int] = defaultdict(int)
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def _free(self, address: int, n_bytes: int) -> None:
        self._known.discard(address)
        self.alive -= n_bytes

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # a sparse tensor has no storage of its own; the operations that made its parts were seen
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                self.shapes[tuple(tensor.shape)] += 1
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result


@contextmanager
def saved_by_layer(base: nn.Module, weights: set[int]) -> Iterator[dict[int, int]]:
    """Count what is saved for the backward by the layer that saves it; -1 is all that comes before the first."""
    saved: dict[int, int] = defaultdict(int)
    seen = set(weights)
    alive = []  # as long as these live, no address is given to another
    current = -1

    def enter(layer: int) -> Callable:
        def hook(*_: Any) -> None:
            nonlocal current
            current = layer

        return hook

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # the parts of a sparse tensor are saved by themselves where they are needed
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                alive.append(storage)
                saved[current] += storage.nbytes()
        return tensor

    names = layer_names(base)
    hooks = [base.get_submodule(name).register_forward_pre_hook(enter(layer)) for layer, name in names.items()]
    last = base.get_submodule(names[max(names)])
    hooks.append(last.register_forward_hook(enter(max(names) + 1)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()


def measure_memory(arm: Arm, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The memory of one step of an arm that has done steps before; see the top of this file."""
    parameters, trained = list(arm.model.parameters()), arm.trained
    own = trained if arm.name != "full" else []  # a full model's weights are the base model's, only trained
    states = [] if arm.optimizer is None else [s for state in arm.optimizer.state.values() for s in state.values()]
    states = [state for state in states if isinstance(state, torch.Tensor)]
    trained_bytes, state_bytes, own_bytes = (
        sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in (trained, states, own)
    )
    known = [*parameters, *arm.model.buffers(), *states, *batch.values()]

    with saved_by_layer(arm.base, {tensor.untyped_storage()._cdata for tensor in known}) as saved:
        loss = arm.model(**batch).loss
    loss.backward()
    arm.model.zero_grad()

    gc.collect()
    with AliveTensors(known, state_bytes + own_bytes) as tensors:
        arm.step(batch)
    geometry = ModelGeometry.of(arm.base)
    frozen_shapes = set()
    for attention in geometry.values():
        for role in ROLES:
            module = arm.base.get_submodule(attention.units(role).module)
            weight = module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight
            if not weight.requires_grad:
                frozen_shapes.add(tuple(weight.shape))
    # Gradients of adapter weights may have such a shape, where all groups of a layer are chosen.
    frozen_shapes -= {tuple(parameter.shape) for parameter in trained}
    result = {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "trained_bytes": trained_bytes,
        "optimizer_bytes": state_bytes,
        "peak_bytes": tensors.peak,
        "saved_bytes": sum(saved.values()),
        "saved_bytes_below": sum(n_bytes for layer, n_bytes in saved.items() if layer < arm.lowest),
        "weight_copies": sum(tensors.shapes[shape] for shape in frozen_shapes),
    }
    if isinstance(arm.model, PeftModel):
        with tempfile.TemporaryDirectory() as folder:
            arm.model.save_pretrained(folder)
            result["checkpoint_bytes"] = Path(folder, "adapter_model.safetensors").stat().st_size
        result["checkpoint_bytes_beyond_weights"] = result["checkpoint_bytes"] - trained_bytes
    return result


def summarize(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each arm."""
    summary = {}
    for name, values in seconds.items():
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        summary[name] = {"median_ms": median * 1e3, "first_quartile_ms": first * 1e3, "third_quartile_ms": third * 1e3}
    return summary


def ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> dict[str, float]:
    """Median and quartiles over the rounds of the ratio of two arms within a round."""
    ratios = [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "first_quartile": first, "third_quartile": third}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub id of a causal language model")
    source.add_argument("--shape", choices=SHAPES, help="random weights in the shape of a model, made on the device")
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the heads to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of heads, tokens and turns (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", help="only these: the fewer, the closer in time are those of a round")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    base = load_model(args.model, args.shape, getattr(torch, args.dtype)).requires_grad_(False)
    base.config.use_cache = False
    input_ids = torch.randint(base.config.vocab_size, (args.rows, args.tokens), device=base.device)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    heads = choose_heads(ModelGeometry.of(base), args.ratio, args.seed)
    make = makers(base, heads, r=16)
    if unknown := set(args.arms or ()) - set(make):
        parser.error(f"--arms: there is no {', '.join(sorted(unknown))}, only {', '.join(make)}")
    arms = [make[name]() for name in make if args.arms is None or name in args.arms]

    load_before = load_average()
    seconds = time_rounds(arms, batch, args.rounds, args.warmup, args.seed)
    load_after = load_average()
    summary: dict[str, dict[str, Any]] = summarize(seconds)
    for arm in arms:
        summary[arm.name].update(lowest_layer=arm.lowest, **measure_memory(arm, batch))
        if arm.name != "full" and "full" in seconds:
            summary[arm.name]["speedup_over_full"] = ratio(seconds, "full", arm.name)
    pairs = [(f"head_sparse_{kind}{where}", f"floor_{where}") for where in heads for kind in ("", "qo_")]
    pairs += [
        (f"head_sparse_{where}", other)
        for where in heads
        for other in ("lora_r16", "shira_r16", f"lora_matched_{where}")
    ]
    pairs = [(a, b) for a, b in pairs if a in seconds and b in seconds]
    result = {
        "command": command("head_sparse_step.py", arguments),
        "machine": {**machine(), "load_average_before": load_before, "load_average_after": load_after},
        "versions": versions(),
        "settings": {
            "model": Path(args.model).name if args.model else f"random weights, {args.shape}",
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "attention": base.config._attn_implementation,
            "batch": [args.rows, args.tokens],
            "optimizer": "torch.optim.AdamW(fused=True)",
            "heads": {where: [list(head) for head in sorted(chosen)] for where, chosen in heads.items()},
        },
        "arms": summary,
        "step_time_ratios": {f"{a} / {b}": ratio(seconds, a, b) for a, b in pairs},
    }

    print(
        f"{'arm':24}{'ms':>8}{'x full':>8}{'trained':>12}{'peak MB':>9}{'saved MB':>9}{'below':>7}{'checkpoint +':>14}"
    )
    for name, row in summary.items():
        speedup = row["speedup_over_full"]["median"] if "speedup_over_full" in row else float(name == "full")
        beyond = row.get("checkpoint_bytes_beyond_weights", "")
        print(
            f"{name:24}{row['median_ms']:8.0f}{speedup:8.2f}{row['trained_parameters']:12,}{row['peak_bytes'] / 1e6:9.1f}"
            f"{row['saved_bytes'] / 1e6:9.1f}{row['saved_bytes_below']:7}{beyond:>14}"
        )
    for pair, values in result["step_time_ratios"].items():
        print(f"{pair:48} {values['median']:.3f}  [{values['first_quartile']:.3f}, {values['third_quartile']:.3f}]")
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
