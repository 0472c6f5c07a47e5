"""The `less` scorer: LESS as published, with gradients of a LoRA adapter after a short training; the expensive rival."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup
from transformers.pytorch_utils import Conv1D

from ..heads import ModelGeometry
from ..heads.geometry import ROLES, base_layer
from ..heads.samples import sample_losses
from ..model_state import autocast_without_cache, preserved_state
from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


# All as in the paper, but for dropout, which is off.
RANK = 128
ALPHA = 512
N_EPOCHS = 4
LEARNING_RATE = 2e-5
WARMUP_RATIO = 0.03
BETAS = (0.9, 0.999)
EPSILON = 1e-8
N_FEATURES = 8192  # of a gradient, after the projection

_ADAPTER = "p2d_less"


@dataclass(frozen=True)
class Checkpoint:
    """
    The adapter after an epoch, and what AdamW knew then. P is the number of the adapter's weights.

    Args:
        weights, mean, square (`torch.Tensor`): Shape (P,), float32, on the CPU: the adapter's weights and the running
            means of their gradients and of the gradients' squares.
        step (`int`): Number of steps up to here.
        learning_rate (`float`): Its mean over the epoch.
    """

    weights: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    step: int
    learning_rate: float


class GradientSketch:
    """
    A seeded random projection that needs no matrix: every entry is added to one of a few sums, with a random sign
    (feature hashing, arXiv 0902.2206). Inner products are kept on average.

    Args:
        n_entries (`int`): P, the length of what is projected.
        n_features (`int`): Number of sums.
        seed (`int`): The same seed gives the same projection.
        device (`torch.device`): Where the vectors will be.
    """

    def __init__(self, n_entries: int, n_features: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._n_features = n_features
        # 5 bytes for each entry
        self._sums = torch.randint(n_features, (n_entries,), generator=generator, dtype=torch.int32).to(device)
        self._signs = (torch.randint(2, (n_entries,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """From shape (P,) to shape (n_features,), float32."""
        return vector.new_zeros(self._n_features).index_add_(0, self._sums, vector * self._signs)


@contextmanager
def lora_adapter(model: nn.Module, seed: int) -> Iterator[list[nn.Parameter]]:
    """
    Context in which a fresh LoRA adapter is on all attention projections of a model, and nothing else requires a
    gradient. On leaving, also through an exception, the projections are the very modules that they were.

    Args:
        model (`nn.Module`): A model without adapters; its `requires_grad` flags and random numbers are the caller's.
        seed (`int`): For the adapter's weights.

    Yields:
        `list[nn.Parameter]`: the adapter's weights; of a half-precision model in float32.

    Raises:
        `ValueError`: if the model has adapters already, or Accelerate keeps its weights elsewhere between passes.
    """
    if any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules()):
        raise ValueError(
            "`scorer`='less' trains a LoRA adapter of its own, but `model` has adapters already. Merge them with "
            "`merge_and_unload()`, pass the model without them, or use 'gradient'."
        )
    if any(parameter.is_meta for parameter in model.parameters()):  # the adapter would be where no values are
        raise ValueError("`scorer`='less' trains, which an offloaded `model` cannot; use 'gradient'.")
    names = dict.fromkeys(
        attention.units(role).module for attention in ModelGeometry.of(model).values() for role in ROLES
    )
    originals = {name: model.get_submodule(name) for name in names}
    left_over = vars(model).pop("peft_config", None)  # adapters that were taken off may leave it behind
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        # a pattern: names in a list would also find the modules whose names end in one of them, as those of a tower may
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=any(isinstance(base_layer(module), Conv1D) for module in originals.values()),
    )
    try:
        torch.manual_seed(seed)
        LoraModel(model, config, _ADAPTER)
        # As `PeftModel` does. In bfloat16 most steps of the training would be rounded away, and in float16 so would
        # AdamW's epsilon, without which it divides by 0.
        cast_adapter_dtype(model, _ADAPTER)
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        vars(model).pop("peft_config", None)
        if left_over is not None:
            model.peft_config = left_over


def train_adapter(context: ScoringContext, parameters: list[nn.Parameter]) -> list[Checkpoint]:
    """Train the adapter on the sample of the pool; a checkpoint after each epoch."""
    sample = context.sample
    assert sample is not None
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    steps_per_epoch = -(-len(sample) // context.batch_size)
    n_steps = N_EPOCHS * steps_per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_RATIO * n_steps), n_steps)
    generator = context.generator(sample)
    checkpoints = []
    for epoch in range(1, N_EPOCHS + 1):
        rates = []
        order = torch.randperm(len(sample), generator=generator).tolist()
        for start in range(0, len(order), context.batch_size):
            for _, batch in context.batches(sample.subset(order[start : start + context.batch_size])):
                with torch.enable_grad():
                    sample_losses(context.model, batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                rates += schedule.get_last_lr()
                schedule.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        checkpoints.append(
            Checkpoint(
                weights=_flat(parameters),
                mean=_flat([state["exp_avg"] for state in states]),
                square=_flat([state["exp_avg_sq"] for state in states]),
                step=epoch * steps_per_epoch,
                learning_rate=sum(rates) / len(rates),
            )
        )
    return checkpoints


@contextmanager
def less(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    LESS (arXiv 2402.04333): how far a step of Adam on a sample would lower the target's loss.

    A LoRA adapter on all attention projections is trained for 4 epochs on a sample of the pool, and kept as it is after
    each of them. The score is the cosine similarity of the step that Adam would take for the sample with the gradient of
    a sample of the target, in the adapter's weights, both projected to 8,192 numbers; its mean over the target's samples
    and, weighted by the learning rate, over the checkpoints. The target is one subtask in the paper's terms.

    It is the expensive rival: 4 epochs of training on the sample, then 4 forward and 4 backward passes for each row of
    pool and target, row by row. Memory: 64 bytes for each weight of the adapter, mostly on the CPU. The adapter is gone
    afterwards.

    Ours: how the gradients are projected (see [`GradientSketch`]), and that the sample to train on is the engine's draw
    of at most 512 rows, where the paper takes 5 % of the pool.

    Yields:
        `ScoreRows`: scores in [-1, 1], float32.

    Raises:
        `ValueError`: if the model has adapters already.
    """
    assert context.target is not None
    model = context.model
    with (
        preserved_state(model),
        autocast_without_cache(model),
        lora_adapter(model, context.seed) as parameters,
    ):
        checkpoints = train_adapter(context, parameters)
        total = sum(checkpoint.learning_rate for checkpoint in checkpoints)
        sketch = GradientSketch(len(checkpoints[0].weights), N_FEATURES, context.seed, context.device)

        def features(samples: Samples, of_adam: bool) -> torch.Tensor:
            """Shape (samples, checkpoints * N_FEATURES), float32, on the CPU: inner products of them are scores."""
            found = torch.empty(len(samples), len(checkpoints), N_FEATURES)
            for number, checkpoint in enumerate(checkpoints):
                _load(parameters, checkpoint.weights)
                mean, square = checkpoint.mean.to(context.device), checkpoint.square.to(context.device)
                share = checkpoint.learning_rate / total
                for index in range(len(samples)):
                    vector = _gradient(context, parameters, samples.subset([index]))
                    if of_adam:
                        vector = _adam_step(vector, mean, square, checkpoint.step)
                    found[index, number] = functional.normalize(sketch(vector), dim=0).cpu() * share**0.5
            return found.flatten(1)

        target = features(context.target, of_adam=False)

        def score(samples: Samples) -> RowScores:
            found = features(samples, of_adam=True)
            with torch.autocast("cpu", enabled=False):
                per_target = found @ target.T
            return RowScores(per_target.mean(dim=1), per_target, found)

        yield score


def _gradient(context: ScoringContext, parameters: list[nn.Parameter], sample: Samples) -> torch.Tensor:
    """The gradient of one sample's loss: shape (P,), float32."""
    _, batch = next(sample.batches(1, context.device))
    with torch.enable_grad():
        gradients = torch.autograd.grad(sample_losses(context.model, batch).sum(), parameters)
    context.progress(1, sample.n_tokens)
    return torch.cat([gradient.flatten().to(context.device, torch.float32) for gradient in gradients])


def _adam_step(gradient: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: int) -> torch.Tensor:
    """The direction of the step that Adam would take next on a gradient; all of shape (P,)."""
    mean = torch.lerp(gradient, mean, BETAS[0]) / (1 - BETAS[0] ** (step + 1))
    square = torch.lerp(gradient**2, square, BETAS[1]) / (1 - BETAS[1] ** (step + 1))
    return mean / (square.sqrt() + EPSILON)


def _flat(tensors: list[torch.Tensor] | list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().to("cpu", torch.float32) for tensor in tensors])


def _load(parameters: list[nn.Parameter], values: torch.Tensor) -> None:
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


SCORER = Scorer(
    "less",
    less,
    needs_heads=False,
    needs_target=True,
    needs_sample=True,
    per_target=True,
    features=True,
    passes=N_EPOCHS,
)
