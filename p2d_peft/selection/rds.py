"""The `rds` scorer: does a sample look like the target in the model's last hidden states?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .head_outputs import RestNotNeeded
from .scoring import Scorer, ScoreRows, ScoringContext
from .similarity import similarity_to_target


@contextmanager
def rds(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Representation-based data selection, RDS+ (arXiv 2503.01807): cosine similarity of a sample's embedding with the
    target's, the mean over its samples. One forward pass over pool and target, without the LM head.

    The embedding is the mean over the last hidden states of all tokens, prompt and answer, where token `i` of `n` has
    the weight `i / (1 + ... + n)`: later tokens have seen more.

    RDS+ itself picks rows in turn for each of the target's samples; that is a policy on `per_target`, not a score.

    Yields:
        `ScoreRows`: scores in [-1, 1], float32.

    Raises:
        `ValueError`: if there is no transformers model in `model`.
    """
    # also that within a PeftModel, whose adapters are part of it
    causal_lm = next((module for module in context.model.modules() if isinstance(module, PreTrainedModel)), None)
    if causal_lm is None:
        raise ValueError(
            f"`scorer`='rds' needs a transformers model, but `model` is {type(context.model).__name__}; use 'affinity'."
        )
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output.last_hidden_state)
        raise RestNotNeeded

    def features(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Shape (B, hidden size), float32."""
        mask_BT = batch["attention_mask"]
        with suppress(RestNotNeeded):
            context.model(input_ids=batch["input_ids"], attention_mask=mask_BT, use_cache=False)
        # without those of the virtual tokens that prompt tuning puts first
        hidden_BTE = seen.pop()[:, -mask_BT.shape[1] :].float()
        weights_BT = (mask_BT.cumsum(1) * mask_BT).to(hidden_BTE)
        with torch.autocast(context.device.type, enabled=False):  # sums of many tokens want their digits
            return torch.einsum("bte,bt->be", hidden_BTE, weights_BT / weights_BT.sum(1, keepdim=True))

    # not `base_model`, which some models pass by
    hook = causal_lm.get_decoder().register_forward_hook(keep)
    try:
        yield similarity_to_target(context, lambda samples: context.of_each(samples, features), centred=False)
    finally:
        hook.remove()


SCORER = Scorer("rds", rds, needs_heads=False, needs_target=True, per_target=True, features=True)
