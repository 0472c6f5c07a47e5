"""The `ifd` scorer: how little does the prompt help with the answer?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .losses import losses_of
from .pool import shortened
from .samples import Samples
from .scoring import RowScores, Scorer, ScoreRows, ScoringContext


# An answer that the model expects from anyone has a loss of 0, and nothing can be said relative to that.
_LEAST_LOSS = 1e-6


@contextmanager
def ifd(context: ScoringContext) -> Iterator[ScoreRows]:
    """
    Instruction-following difficulty (Cherry, arXiv 2308.12032): the loss of a sample's answer behind its prompt, divided
    by the loss of the answer alone. Two forward passes. The answer is what counts in the loss, the prompt is what comes
    before it.

    The most difficult samples are taken first, but where the prompt does harm, at a ratio of 1 or more, prompt and
    answer do not belong together. The paper drops those; here they come after all others, the worst last.

    Ours: the answer alone stands behind the sample's first token (the beginning-of-sequence token, or the first of the
    chat template), so that its own first token is predicted from something, and the same tokens count both times.

    Superfiltering (arXiv 2402.00530) is this scorer with a smaller model: give that model and its tokenizer to the
    selector.

    Yields:
        `ScoreRows`: scores, float32: the ratio where it is below 1, else minus the ratio.

    Raises:
        `ValueError`: if a sample has no prompt; the rows are named.
    """

    def score(samples: Samples) -> RowScores:
        bare = [row for row, labels in zip(samples.rows, samples.labels, strict=True) if labels[0] != -100]
        if bare:
            raise ValueError(
                "`scorer`='ifd' compares answers with and without their prompts, but in the `pool` all tokens count "
                f"from the first one on in rows {shortened(bare)}. Give prompts and completions in columns of their own, set "
                "`assistant_only_loss=True` in `args`, or use 'perplexity'."
            )
        ratio = losses_of(context, samples) / losses_of(context, answers_alone(samples)).clamp(min=_LEAST_LOSS)
        return RowScores(torch.where(ratio < 1, ratio, -ratio))

    yield score


def answers_alone(samples: Samples) -> Samples:
    """The samples without their prompts: of each the first token, which does not count, and those that count."""
    answers = [[label for label in labels if label != -100] for labels in samples.labels]
    firsts = [ids[0] for ids in samples.input_ids]
    return replace(
        samples,
        input_ids=[[first, *answer] for first, answer in zip(firsts, answers, strict=True)],
        labels=[[-100, *answer] for answer in answers],
    )


SCORER = Scorer("ifd", ifd, needs_heads=False, needs_target=False, passes=2)
