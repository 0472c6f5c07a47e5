"""What a scorer is: the one interface that the files of the scorers beside this one fill in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..heads import HeadSet
from .samples import Samples


def _no_progress(n_rows: int, n_tokens: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class ScoringContext:
    """
    What a scorer gets.

    Args:
        model (`nn.Module`): The model, in eval mode and without gradients; a scorer leaves it as it is.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, for scorers that have to read what the model says.
        sample (`Samples`, *optional*): A seeded draw of the pool's rows (of a stream, its first rows), for what a scorer
            has to know of the pool as a whole; None for scorers that need none.
        target (`Samples`, *optional*): The samples of the task; None for scorers that need none.
        heads (`HeadSet`, *optional*): The selected heads; None for scorers that need none.
        batch_size (`int`): Samples a forward pass.
        seed (`int`): For all that is random.
        device (`torch.device`): Where the model takes its inputs.
        progress (`Callable[[int, int], None]`): To be called with the numbers of rows and tokens that were passed
            through the model; [`~ScoringContext.batches`] does.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sample: Samples | None
    target: Samples | None
    heads: HeadSet | None
    batch_size: int
    seed: int
    device: torch.device
    progress: Callable[[int, int], None] = _no_progress

    def batches(self, samples: Samples) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """The batches of samples, as [`Samples.batches`] gives them, on the model's device."""
        for indices, batch in samples.batches(self.batch_size, self.device):
            n_tokens = int(batch["attention_mask"].sum())
            yield indices, batch
            self.progress(len(indices), n_tokens)

    def of_each(self, samples: Samples, of_batch: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """
        What a function says of each sample, batch by batch.

        Args:
            samples (`Samples`): The samples, n of them.
            of_batch (`Callable`): From a batch, as [`~ScoringContext.batches`] gives it, to a tensor of shape (B, ...).

        Returns:
            `torch.Tensor`: shape (n, ...), in the order of the samples, on the CPU.
        """
        parts: dict[int, torch.Tensor] = {}
        for indices, batch in self.batches(samples):
            parts.update(zip(indices, of_batch(batch).cpu(), strict=True))
        return torch.stack([parts[index] for index in range(len(samples))])

    def generator(self, samples: Samples) -> torch.Generator:
        """A random number generator for these samples: the same for the same seed and rows, whatever came before."""
        # the modulus is that of `hash`, which has the same value for -1 and -2
        seed = self.seed % sys.hash_info.modulus
        return torch.Generator().manual_seed(hash((seed, samples.rows[0])) % 2**63)


@dataclass(frozen=True)
class RowScores:
    """
    What a scorer says of n samples.

    Args:
        scores (`torch.Tensor`): Shape (n,): the higher, the sooner a sample is taken.
        per_target (`torch.Tensor`, *optional*): Shape (n, target's samples): the score for each of them alone, from
            scorers that have such a thing.
        features (`torch.Tensor`, *optional*): Shape (n, d), float32: where the samples lie for the scorer; nearby ones
            have a high cosine similarity. From scorers that have such a thing.
    """

    scores: torch.Tensor
    per_target: torch.Tensor | None = None
    features: torch.Tensor | None = None


# scores samples; those of one call are neighbours in the pool
ScoreRows: TypeAlias = Callable[[Samples], RowScores]


@dataclass(frozen=True)
class Scorer:
    """
    A scorer and what it needs.

    A sample's score may depend on the context and on the sample, and, where a scorer puts samples together, on the other
    samples of its call; never on other calls. That is what makes it possible to score a pool in shards, in any order, on
    several processes, and to go on after a crash.

    Args:
        name (`str`): What to call it in messages.
        open (`Callable[[ScoringContext], AbstractContextManager[ScoreRows]]`):
            A context manager that reads the target and the sample of the pool, and gives the function that scores
            samples. What it changes in the model is put back on leaving.
        needs_heads (`bool`): Whether it needs the selected heads. It may count on getting them.
        needs_target (`bool`): Whether it needs samples of the task. It may count on getting them.
        needs_sample (`bool`, *optional*, defaults to `False`): Whether it needs a sample of the pool.
        per_target (`bool`, *optional*, defaults to `False`): Whether its [`RowScores`] tell of each of the target's samples,
            which some policies need.
        features (`bool`, *optional*, defaults to `False`): Whether its [`RowScores`] have features, which some
            policies need.
        passes (`int`, *optional*, defaults to 1): How often a row passes through [`ScoringContext.batches`].
        generates (`bool`, *optional*, defaults to `False`): Whether it has the model generate, so that its scores
            depend on the model's `generation_config`.
        whole_pool (`bool`, *optional*, defaults to `False`): Whether all samples of the pool have to be in one call.
        options (`Any`, *optional*): What its scores depend on beside the context and its name: a number, a tuple, a
            function. Where name, options and the code of `open` are those of an earlier run, scores in a `cache_dir` are taken
            over; where options cannot be pickled none are kept.
    """

    name: str
    open: Callable[[ScoringContext], AbstractContextManager[ScoreRows]]
    needs_heads: bool
    needs_target: bool
    needs_sample: bool = False
    per_target: bool = False
    features: bool = False
    passes: int = 1
    generates: bool = False
    whole_pool: bool = False
    options: Any = None
