"""The attention that selected heads pay, observed through transformers' own `AttentionInterface`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..heads import HeadSet, ModelGeometry


IMPLEMENTATION = "p2d_observed_sdpa"
# (layer, weights of shape (B, heads of the layer, queries, keys) in float32) -> None
Observer: TypeAlias = Callable[[int, torch.Tensor], None]

_observed: WeakKeyDictionary[nn.Module, Callable[..., None]] = WeakKeyDictionary()


def _observed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, which also shows the weights of a module's selected heads to its observer, if it has one."""
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"The attention of {type(module).__name__} has sinks, which SDPA cannot compute.")
    if module in _observed:
        _observed[module](query, key, attention_mask, scaling)
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output


AttentionInterface.register(IMPLEMENTATION, _observed_sdpa)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def observable_attention(
    model: nn.Module, heads: HeadSet
) -> Iterator[Callable[[int, Observer], AbstractContextManager[None]]]:
    """
    Context in which the attention weights of the given heads can be observed. All heads go through SDPA as usual; the
    model's own attention implementation, or that of each of its parts, is put back on leaving.

    Args:
        model (`nn.Module`): A transformers model, or a `PeftModel` around one.
        heads (`HeadSet`): The heads to observe.

    Yields:
        `Callable`: `observed(n_queries, observer)` is a context for the forward passes to observe, at little cost to
        enter. For each of them the observer is called once for each layer with such heads, in the order of the layers,
        with the layer and the weights of the last `n_queries` positions: shape (B, heads of the layer, n_queries, keys),
        float32. They are computed beside SDPA, and only within this context.

    Raises:
        `ValueError`: if the model's attention implementation cannot be exchanged, or the model does not do with SDPA.
    """
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if transformer is None or not _does_with_sdpa(transformer) or not transformer._can_set_attn_implementation():
        raise ValueError(
            f"The attention implementation of `model` ({type(transformer or model).__name__}) cannot be exchanged for "
            "SDPA; use a scorer that needs no attention weights, such as 'affinity'."
        )
    geometry = ModelGeometry.of(model)
    # each attention module with its layer, its heads and their groups
    watched = {
        model.get_submodule(geometry[layer].name): (layer, chosen, [geometry[layer].group(head) for head in chosen])
        for layer, chosen in geometry.check(heads).by_layer().items()
    }

    @contextmanager
    def observed(n_queries: int, observer: Observer) -> Iterator[None]:
        try:
            for module, (layer, chosen, groups) in watched.items():
                _observed[module] = _observer_of(layer, chosen, groups, n_queries, observer)
            yield
        finally:
            for module in watched:
                _observed.pop(module, None)

    parts = [
        part
        for module in transformer.modules()
        if isinstance(module, PreTrainedModel)
        for part in _parts(module.config)
    ]
    originals = [(part, part._attn_implementation) for part in parts]
    try:
        transformer.set_attn_implementation(IMPLEMENTATION)
        yield observed
    finally:
        # in the same order: what is set of a config is set of its parts, too
        for part, original in originals:
            part._attn_implementation = original


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and behind it those of its parts: of a text and a vision model, say."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _does_with_sdpa(transformer: PreTrainedModel) -> bool:
    # Gemma 2 caps its logits, which SDPA leaves out; older versions of transformers let it go through SDPA all the same.
    caps = getattr(transformer.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return transformer._supports_sdpa and not caps


def _observer_of(
    layer: int, heads: list[int], groups: list[int], n_queries: int, observer: Observer
) -> Callable[..., None]:
    def observe(
        query_BHTD: torch.Tensor,
        key_BGSD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> None:
        query = query_BHTD[:, heads, -n_queries:].float()
        key = key_BGSD[:, groups].float()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ key.transpose(-1, -2) * scale
        n, n_keys = logits.shape[-2:]
        if attention_mask is None:  # SDPA's is_causal
            mask = torch.ones(n_keys, n_keys, dtype=torch.bool, device=logits.device).tril()[-n:]
        else:
            mask = attention_mask[:, :, -n:, :n_keys]
        # The least finite number rather than -inf: a padded position may attend to nothing, and NaN would spread.
        least = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, least) if mask.dtype == torch.bool else logits + mask.float()
        observer(layer, torch.softmax(logits, dim=-1))

    return observe
