"""
The same heads of the same model in two layouts of attention: does training them give the same result?

    python benchmarks/fused_layout.py --model FOLDER --output benchmarks/results/fused_layout.json

A Llama model is rearranged into Phi-3's layout, which changes no number: q, k and v are concatenated into one projection,
gate and up into another. In both, 10 % of the heads, drawn at random, are trained by a few steps of AdamW on random
tokens. Written down are the largest differences between the two: of the logits before, of the losses, and of the trained
weights in relation to how far they moved.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from environment import machine, versions
from head_sparse_step import choose_heads
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.files import write_json
from p2d_peft.heads.geometry import ROLES, ROWS, ModelGeometry


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def phi3_of(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """The same model, with copies of its weights, in Phi-3's layout."""
    config = Phi3Config(**{size: getattr(llama.config, size) for size in SIZES})
    model = Phi3ForCausalLM(config).to(llama.dtype).eval()
    weights = dict(llama.state_dict())
    for layer in range(llama.config.num_hidden_layers):
        for fused, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
            block, _, name = f"model.layers.{layer}.{fused}".rpartition(".")
            pieces = [weights.pop(f"{block}.{part}_proj.weight") for part in parts]
            weights[f"{block}.{name}_proj.weight"] = torch.cat(pieces)
    model.load_state_dict(weights)
    return model


def train(
    model: nn.Module, heads: HeadSet, batches: list[torch.Tensor], lr: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """
    Train heads by one step of AdamW a batch.

    Returns:
        `tuple`: the losses, and for each head and role, named alike in all layouts, what it moved by: a tensor of shape
        (rows of the head, hidden) or (hidden, columns of the head).
    """
    geometry = ModelGeometry.of(model)
    adapted = get_peft_model(model, HeadSparseConfig(heads=heads))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for input_ids in batches:
        loss = adapted(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = {}
    for layer, head in heads:
        for role in ROLES:
            delta = adapted.get_base_model().get_submodule(geometry[layer].units(role).module)
            dense, own = delta.get_delta_weight("default").detach(), geometry[layer].head_slice(role, head)
            moved[f"{layer}.{head}.{role}"] = dense[own] if geometry[layer].units(role).dim == ROWS else dense[:, own]
    adapted.unload()
    return losses, moved


def compare(llama: LlamaForCausalLM, heads: HeadSet, batches: list[torch.Tensor], lr: float) -> dict[str, Any]:
    """The largest differences between a model and its rearranged copy, before and after training."""
    phi3 = phi3_of(llama)
    with torch.no_grad():
        logits = [model(batches[0], use_cache=False).logits for model in (llama, phi3)]
    (losses, moved), (fused_losses, fused_moved) = (train(model, heads, batches, lr) for model in (llama, phi3))
    difference = sum((moved[key] - fused_moved[key]).double().square().sum() for key in moved) ** 0.5
    return {
        "logits_largest_difference": (logits[0] - logits[1]).abs().max().item(),
        "logits_largest": logits[0].abs().max().item(),
        "losses": losses,
        "losses_fused": fused_losses,
        "trained_relative_difference": float(
            difference / sum(delta.double().square().sum() for delta in moved.values()) ** 0.5
        ),
        "trained_slices": len(moved),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a Llama model")
    parser.add_argument("--steps", type=int, default=5, help="steps of training (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a batch's one row (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of heads and tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    llama = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    heads = choose_heads(ModelGeometry.of(llama), 0.1, args.seed)["anywhere"]
    batches = [torch.randint(llama.config.vocab_size, (1, args.tokens)) for _ in range(args.steps)]
    result = {
        "command": f"python benchmarks/fused_layout.py --model {Path(args.model).name} --steps {args.steps} "
        f"--tokens {args.tokens} --lr {args.lr} --seed {args.seed}",
        "machine": machine(),
        "versions": versions(),
        "heads": [list(head) for head in heads],
        **compare(llama, heads, batches, args.lr),
    }
    for name in ("logits_largest_difference", "logits_largest", "trained_relative_difference"):
        print(f"{name:32}{result[name]:.3g}")
    print("losses       ", " ".join(f"{loss:.6f}" for loss in result["losses"]))
    print("losses, fused", " ".join(f"{loss:.6f}" for loss in result["losses_fused"]))
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
