"""Whether a stage left a model as it found it."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel


def mixed_state(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into a state that no stage would leave by accident."""
    model.train()
    model.model.layers[1].eval()
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.requires_grad = False
    attention.k_proj.weight.grad = torch.ones_like(attention.k_proj.weight)
    return model


def snapshot(model: PreTrainedModel) -> dict:
    """Everything of a model that a stage could leave changed."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: PreTrainedModel, before: dict) -> None:
    after = snapshot(model)
    for part in ("weights", "grad"):
        assert after[part].keys() == before[part].keys()
        for name, value in before[part].items():
            same = (
                value is after[part][name]
                if value is None
                else torch.equal(value.nan_to_num(), after[part][name].nan_to_num())
            )
            assert same, (part, name)
    for part in ("requires_grad", "training", "hooks", "config", "attention"):
        assert after[part] == before[part], part
    assert torch.equal(after["rng"], before["rng"])


# transformers 5.24 has other needs for its own methods (`add_adapter` and its kin) than for the rest
needs_own_adapter_methods = pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22"),
    reason="the adapter methods of transformers 5.24 demand peft 0.22",
)
