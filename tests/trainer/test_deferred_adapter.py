from collections import Counter

import pytest

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.trainer.deferred_adapter import attach

from ..model_checks import assert_unchanged, snapshot
from ..tiny_models import tiny_model
from .test_p2d_trainer import config, deltas, trainer


def test_attaching_leaves_the_users_config_as_it_is(tmp_path):
    mine = HeadSparseConfig(target_modules=["q_proj"])
    model = attach(tiny_model(), mine, HeadSet([(1, 2)]), config(tmp_path))
    assert mine.heads is None and model.peft_config["default"].heads == {1: [2]}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.layers.1.self_attn.q_proj.head_sparse_delta.default.weight"
    ]
    assert not model.get_input_embeddings()._forward_hooks  # the backward pass ends at layer 1


def test_where_attaching_fails_model_and_trainer_are_what_they_were(tmp_path):
    adapter = HeadSparseConfig(task_type="CAUSAL_LM", trainable_token_indices={"nowhere": [1]})
    run = trainer(tmp_path, peft_config=adapter, changes={"max_steps": 1, "reference_steps": 0})
    before, modules = snapshot(run.model), list(run.model.modules())
    pool = run.train_dataset
    with pytest.raises(ValueError, match="nowhere"):
        run.train()
    assert_unchanged(run.model, before)
    assert all(a is b for a, b in zip(modules, run.model.modules(), strict=True))
    assert run.heads is None and run.train_dataset is pool and "peft_config" not in vars(run.model)
    adapter.trainable_token_indices = None
    run.train()
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == set(deltas(run.model))


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_checkpoints_the_backward_pass_ends_at_the_lowest_head(use_reentrant, by_user, tmp_path):
    kwargs = {"use_reentrant": use_reentrant}
    changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    model = tiny_model()
    if by_user:
        model.gradient_checkpointing_enable(kwargs)  # and with it the embeddings' gradients
    run = trainer(tmp_path, model, heads=HeadSet([(1, 2)]), changes={**changes, "data_ratio": 1.0, "max_steps": 1})
    passes = Counter()
    for index, layer in enumerate(run.model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: passes.update([index]))
    run.train_dataset = run.train_dataset.select(range(4))
    run.args.reference_steps = 0
    run.train()
    # a layer with a backward pass is run a second time for it
    assert passes == {0: 2 if use_reentrant else 1, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["query"]}, r"`target_modules` \(\{'query'\}\), .* leave nothing to train"),
        ({"exclude_modules": r".*_proj"}, r"`exclude_modules` \(\.\*_proj\) .* leave nothing to train"),
        ({"layers_to_transform": [7]}, r"`layers_to_transform` \(\[7\]\) .*; the model's layers: 0, 1, 2\."),
        ({"r": 1000}, r"`r` must be 1 to \d+ for '.*q_proj'"),
    ],
)
def test_what_cannot_be_attached_to_any_head_is_told_of_at_once(changes, message, tmp_path):
    model = tiny_model()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, peft_config=HeadSparseConfig(task_type="CAUSAL_LM", **changes))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True)) and "peft_config" not in vars(model)
