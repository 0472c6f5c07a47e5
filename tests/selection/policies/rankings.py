"""Rankings for tests: everything of a pool by hand, and a record of what was asked for."""

from __future__ import annotations

import torch

from p2d_peft.selection.policies import Ranking
from p2d_peft.selection.samples import Samples


def ranking(
    n_rows=6,
    wanted=3,
    n_tokens=None,
    columns=None,
    tokens=None,
    features=None,
    per_target=None,
    asked=None,
    seed=0,
    max_tokens=None,
):
    """A ranking of rows by their numbers; what is asked for is appended to `asked`."""
    asked = [] if asked is None else asked

    def samples(rows):
        asked.append(list(rows))
        rows = sorted(rows)
        return Samples(rows, [tokens[row] for row in rows], [tokens[row] for row in rows], n_rows, 0, 0)

    def features_of(rows):
        asked.append(list(rows))
        return features[rows]

    return Ranking(
        scores=-torch.arange(n_rows, dtype=torch.float64),
        n_tokens=torch.ones(n_rows, dtype=torch.int64) if n_tokens is None else torch.tensor(n_tokens),
        wanted=wanted,
        seed=seed,
        column=lambda name: columns[name],
        samples=samples,
        features=features_of,
        per_target=per_target,
        max_tokens=max_tokens,
    )
