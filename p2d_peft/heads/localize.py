"""`localize_heads`: step one of the method, which heads a task moves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers.trainer_utils import has_length
from transformers.utils.logging import tqdm

from ..argument_checks import check_choice, is_index
from ..model_checks import check_runnable, check_vocabulary
from ..model_state import autocast_without_cache, model_id, preserved_state, uncompiled
from ..printable import shown
from .ablation import ablation_scores
from .agreement import agreement_scores
from .fisher import fisher_scores
from .gain import gain_scores, gain_sgd_scores
from .gate import gate_scores
from .geometry import ModelGeometry
from .magnitude import magnitude_scores
from .proxy import proxy_scores
from .random import random_scores
from .samples import IGNORED, Batch, is_encoder_decoder
from .scores import HeadScores
from .taylor import taylor_scores
from .trained import trained_scores
from .weights import LayerScores


logger = logging.getLogger(__name__)

LocalizeMethod = Literal[
    "proxy",
    "taylor",
    "gate",
    "fisher",
    "gain",
    "gain_sgd",
    "agreement",
    "ablation",
    "trained",
    "magnitude",
    "random",
]

# (model, geometry, batches, seed) -> scores; runs inside preserved_state
Localizer: TypeAlias = Callable[[nn.Module, ModelGeometry, Iterable[Batch], int], LayerScores]

_METHODS: dict[str, Localizer] = {
    "proxy": proxy_scores,
    "taylor": taylor_scores,
    "gate": gate_scores,
    "fisher": fisher_scores,
    "gain": gain_scores,
    "gain_sgd": gain_sgd_scores,
    "agreement": agreement_scores,
    "ablation": ablation_scores,
    "trained": trained_scores,
    "magnitude": magnitude_scores,
    "random": random_scores,
}


# what these look at are outputs of heads, not weights
_WITHOUT_WEIGHTS = ("gate", "ablation", "random")


def needs_weights(method: LocalizeMethod) -> bool:
    """Whether a method needs floating-point weights, which quantized models do not have."""
    return method not in _WITHOUT_WEIGHTS


def localize_heads(
    model: nn.Module, batches: Iterable[Batch], method: LocalizeMethod | Localizer, seed: int = 42
) -> HeadScores:
    """
    Score all attention heads of a model by how much they matter for a task (P2D section 3.2.1).

    With the methods here the model comes out as it went in, bit for bit: weights, gradients, `requires_grad`, train/eval
    mode, hooks, random number generators; also when a pass fails.

    Args:
        model (`nn.Module`):
            A causal language model or a text-to-text encoder-decoder. All methods but `gate`, `ablation` and `random`
            need floating-point weights.
        batches (`Iterable[Batch]`):
            About 100 samples of the task, as a data loader gives them: mappings with `input_ids`, `attention_mask` and
            `labels` of shape (B, T), int64, labels -100 on tokens that do not count. An encoder-decoder's labels are its
            decoder's, of a length of their own. `magnitude` and `random` read none.
        method (`str` or `Callable`):
            There is no default, as none was seen to find heads that learn more than a draw's (`docs/localization.md`):

            - `"proxy"`: the paper's, the shift of a head's weights in a short proxy run over the batches;
            - `"taylor"`: the sum of |gradient x weight| over a head's slices, sample by sample;
            - `"gate"`: |gradient of the loss for a factor on the head's output|, mean over samples;
            - `"fisher"`: the squares of the gradients of a head's slices, mean over samples;
            - `"gain"`: the L1 norm of the mean gradient, what Adam's first step on a head's slices promises;
            - `"gain_sgd"`: its squared L2 norm, what a step of gradient descent promises;
            - `"agreement"`: signal to noise of the samples' gradients;
            - `"ablation"`: the exact change of the loss without the head, one forward pass for each head;
            - `"trained"`: the fall of the held-out loss when the head alone is trained, for small models;
            - `"magnitude"`: the norm of a head's weights, a control without the task;
            - `"random"`: a draw, the control that no other was seen to beat;
            - a function of one's own: from the model, its [`ModelGeometry`], the batches and the seed to a mapping from
              each layer with heads to their scores, a tensor of shape (H,). It may change `requires_grad` and the
              train/eval mode; weights, gradients and hooks it has to leave as they are. Its name is what the scores are
              called by.
        seed (`int`, *optional*, defaults to 42):
            For what is random in a method; of those here that is `random` alone. The same seed gives the same scores.

    Returns:
        [`HeadScores`]: the table; `.top(0.1)` is the set of heads that the paper goes on with. Rows are layers, of an
        encoder-decoder in the order `cross.0`, ..., `decoder.0`, ..., `encoder.0`, ....

    Raises:
        `TypeError`: if `model` is no model, `batches` cannot be iterated or holds no tensors of shape (B, T), or `seed` is no
            integer.
        `ValueError`: if `batches` does not hold mappings with `input_ids` and `labels`, the method is unknown, the model's attention is not supported, the method needs floating-point
            weights and the model has others, a weight is not finite or on the meta device, `batches` holds nothing that
            counts or tokens that the model does not know, or a score is not a number.
        `KeyboardInterrupt`: as it comes, after a warning that says that nothing is kept.

    Example:

    ```python
    >>> from p2d_peft import localize_heads

    >>> heads = localize_heads(model, data_loader, method="proxy").top(0.1)
    ```
    """
    if isinstance(method, str) or not callable(method):
        check_choice("method", method, _METHODS, ", or a function")
        name, localizer = str(method), _METHODS[method]
    else:
        # an object that is called, as a partial is, may have no name but its class's
        name, localizer = getattr(method, "__name__", type(method).__name__), method
    if not is_index(seed):
        raise TypeError(f"`seed` must be an integer, got {seed!r}.")
    seed = int(seed)
    geometry = ModelGeometry.of(model)
    start = time.perf_counter()
    if method != "random":
        check_runnable(model)
    counted = _Counted(batches, model, name)
    try:
        with preserved_state(model), autocast_without_cache(model), uncompiled(), torch.enable_grad():
            values = localizer(model, geometry, counted, seed)
    except KeyboardInterrupt:
        logger.warning(
            "Localizing stopped after %d samples. Nothing of it is kept, and the model is as it was: localize again, with "
            "fewer samples or another `method` if it takes too long.",
            counted.n_samples,
        )
        raise
    seconds = time.perf_counter() - start

    for layer, attention in geometry.items():
        if layer not in values or values[layer].shape != (attention.n_heads,):
            got = f"{tuple(values[layer].shape)}" if layer in values else "nothing"
            raise ValueError(
                f"`method`={name!r} must give a tensor of shape ({attention.n_heads},) for layer {layer}, got {got}."
            )
    bad = [tuple(head) for head in geometry.heads if not torch.isfinite(values[head.layer][head.head])]
    if bad:
        raise ValueError(
            f"`method`={name!r} gave no finite score for {len(bad)} of {len(geometry.heads)} heads, first for "
            f"(layer, head) {bad[0]}: the model's loss or gradients are not finite on `batches`."
        )
    table = torch.full(geometry.shape, torch.nan, dtype=torch.float64)
    for layer, row in zip(geometry.rows, table, strict=True):
        if layer in geometry:  # a hybrid's layers without heads have none
            row[: geometry[layer].n_heads] = values[layer]
    groups = tuple(geometry[layer].n_kv_heads if layer in geometry else 0 for layer in geometry.rows)
    return HeadScores(
        table,
        name,
        seed,
        counted.n_samples or None,
        model_id(model),
        seconds,
        layers=geometry.rows,
        n_kv_heads=groups,
    )


class _Counted:
    """Passes batches on, checks them, counts their rows and shows how far it is."""

    def __init__(self, batches: Iterable[Batch], model: nn.Module, method: str) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping)):
            raise TypeError(f"`batches` must be a data loader or a list of batches, got {type(batches).__name__}.")
        self.batches = batches
        self.n_samples = 0
        self._model = model
        self._desc = f"Localize ({method})"

    def __iter__(self) -> Iterator[Batch]:
        # a loader of a stream has a `__len__`, too, which raises
        total = len(self.batches) if has_length(self.batches) else None  # type: ignore[arg-type]
        with tqdm(total=total, desc=self._desc, unit="batch") as bar:
            for batch in self.batches:
                self._check(batch)
                self.n_samples += batch["input_ids"].shape[0]
                yield batch
                bar.update(1)

    def _check(self, batch: Batch) -> None:
        if not isinstance(batch, Mapping) or (missing := {"input_ids", "labels"} - set(batch)):
            without = "" if not isinstance(batch, Mapping) else f" without {sorted(missing)}"
            raise ValueError(
                f"`batches` must hold mappings with 'input_ids' and 'labels', got a {type(batch).__name__}{without}; "
                "heads are localized by a loss on text."
            )
        input_ids, labels = batch["input_ids"], batch["labels"]
        for name, values in (("input_ids", input_ids), ("labels", labels)):
            if not isinstance(values, torch.Tensor) or values.dim() != 2:
                raise TypeError(f"`batches` must hold tensors of shape (B, T), got {shown(values)} for '{name}'.")
        expected = labels.shape[:1] if is_encoder_decoder(self._model) else labels.shape
        if input_ids.shape[: len(expected)] != expected:
            raise ValueError(
                f"`batches` holds 'input_ids' of shape {tuple(input_ids.shape)} with 'labels' of shape "
                f"{tuple(labels.shape)}, but each token has one label, -100 where it does not count."
            )
        for values in (input_ids, labels[labels != IGNORED]):
            if values.numel():
                check_vocabulary("batches", int(values.min()), int(values.max()), self._model)
