"""`SFTTrainer` beside a `P2DTrainer`: what is no part of P2D has to come out the same, to the bit."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from ..tiny_models import tiny_model, tiny_tokenizer


def plain_sft(run: SFTTrainer, dataset: Any, **kwargs: Any) -> SFTTrainer:
    """`SFTTrainer` with the arguments of a run, on a tiny model of its own; `kwargs` go to it."""
    shared = SFTConfig.__dataclass_fields__
    args = SFTConfig(**{name: value for name, value in vars(run.args).items() if name in shared})
    given = {"model": tiny_model(), "processing_class": tiny_tokenizer(), **kwargs}
    return SFTTrainer(args=args, train_dataset=dataset, **given)


def assert_trains_as(run: SFTTrainer, plain: SFTTrainer) -> None:
    """
    Assert that both see the same rows, take the same steps and end with the same weights.

    Args:
        run (`SFTTrainer`): A trainer that has trained.
        plain (`SFTTrainer`): A trainer that has not; it is trained here.
    """
    plain.train()
    if "input_ids" in plain.train_dataset.column_names:
        for column in ("input_ids", "labels"):
            assert run.train_dataset[column][:] == plain.train_dataset[column][:]
    keys = ("loss", "grad_norm", "learning_rate", "step", "num_tokens", "mean_token_accuracy", "eval_loss")
    ours, theirs = ([[entry.get(key) for key in keys] for entry in t.state.log_history[:-1]] for t in (run, plain))
    assert ours == theirs and len(ours) > 0
    ours, theirs = ({name: p for name, p in t.model.named_parameters() if p.requires_grad} for t in (run, plain))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
