"""`localize_heads`: step one of the method, which heads a task moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from ..model_state import autocast_without_cache, model_id, preserved_state
from .geometry import ModelGeometry
from .proxy import proxy_scores
from .random import random_scores
from .scores import HeadScores
from .taylor import taylor_scores
from .weights import Batch


LocalizeMethod = Literal["proxy", "taylor", "random"]

# (model, geometry, batches, seed) -> scores of shape (L, H); runs inside preserved_state
_METHODS: dict[str, Callable[[nn.Module, ModelGeometry, Iterable[Batch], int], torch.Tensor]] = {
    "proxy": proxy_scores,
    "taylor": taylor_scores,
    "random": random_scores,
}


def localize_heads(
    model: nn.Module, batches: Iterable[Batch], method: LocalizeMethod = "proxy", seed: int = 42
) -> HeadScores:
    """
    Score all attention heads of a model by how much they matter for a task (P2D section 3.2.1).

    The model comes out as it went in, bit for bit: weights, gradients, `requires_grad`, train/eval mode, hooks, random
    number generators; also when a pass fails.

    Args:
        model (`nn.Module`):
            A causal language model; encoder-decoders are refused. All methods but `random` need floating-point weights.
        batches (`Iterable[Batch]`):
            About 100 samples of the task, as a data loader gives them: mappings with `input_ids`, `attention_mask` and
            `labels` of shape (B, T), int64, labels -100 on tokens that do not count.
        method (`str`, *optional*, defaults to `"proxy"`):
            - `"proxy"`: the paper's, the shift of a head's weights in a short proxy run over the batches;
            - `"taylor"`: the sum of |gradient x weight| over a head's slices;
            - `"random"`: the control.
        seed (`int`, *optional*, defaults to 42):
            For what is random in a method. The same seed gives the same scores.

    Returns:
        [`HeadScores`]: the table; `.top(0.1)` is the set of heads that the paper goes on with.

    Raises:
        `ValueError`: if the method is unknown, the model's attention is not supported or in several stacks, its
            weights have no gradients, `batches` holds nothing that counts, or a score is not a number.

    Example:

    ```python
    >>> from p2d_peft import localize_heads

    >>> heads = localize_heads(model, data_loader, method="proxy").top(0.1)
    ```
    """
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
    geometry = ModelGeometry.of(model)
    if geometry.stacks:
        raise ValueError(
            f"`model` ({type(model).__name__}) has several stacks of attention ({', '.join(geometry.stacks)}); heads are "
            "localized in models with one stack. Choose the heads of this one by hand."
        )
    counted = _Counted(batches)
    start = time.perf_counter()
    with preserved_state(model), autocast_without_cache(model):
        values = _METHODS[method](model, geometry, counted, seed)
    seconds = time.perf_counter() - start

    scores = torch.full(geometry.shape, torch.nan, dtype=torch.float64)
    for layer, attention in geometry.items():
        scores[layer, : attention.n_heads] = values[layer, : attention.n_heads]
    bad = [tuple(head) for head in geometry.heads if not torch.isfinite(scores[head])]
    if bad:
        raise ValueError(
            f"`method`={method!r} gave no finite score for {len(bad)} of {len(geometry.heads)} heads, first for "
            f"(layer, head) {bad[0]}: the model's loss or gradients are not finite on `batches`."
        )
    return HeadScores(scores, method, seed, counted.n_samples or None, model_id(model), seconds)


class _Counted:
    """Passes batches on and counts their rows."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.n_samples = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.n_samples += batch["input_ids"].shape[0]
            yield batch
