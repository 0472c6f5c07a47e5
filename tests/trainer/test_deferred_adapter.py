from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.trainer.deferred_adapter import attach

from ..tiny_models import tiny_model
from .test_p2d_trainer import config


def test_attaching_leaves_the_users_config_as_it_is(tmp_path):
    mine = HeadSparseConfig(target_modules=["q_proj"])
    model = attach(tiny_model(), mine, HeadSet([(1, 2)]), config(tmp_path))
    assert mine.heads is None and model.peft_config["default"].heads == {1: [2]}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.layers.1.self_attn.q_proj.head_sparse_delta.default"
    ]
    assert not model.get_input_embeddings()._forward_hooks  # the backward pass ends at layer 1


def test_reentrant_checkpoints_get_an_input_that_needs_a_gradient(tmp_path):
    args = config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    model = attach(tiny_model(), HeadSparseConfig(), HeadSet([(1, 2)]), args)
    assert model.get_input_embeddings()._forward_hooks
