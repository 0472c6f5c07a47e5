import math
import sys

import matplotlib
import pytest
import torch

from p2d_peft.report.score_plots import plot_scores


matplotlib.use("Agg")


def test_histogram_counts_each_row_once_and_marks_the_cut():
    scores = torch.tensor([0.1, 0.9, math.nan, 0.5, 0.7])
    ax = plot_scores(scores, kept=[1, 4])
    left_out, kept = ax.containers
    assert sum(bar.get_height() for bar in left_out) == 2 and sum(bar.get_height() for bar in kept) == 2
    (cut,) = (line for line in ax.lines)
    assert cut.get_xdata()[0] == float(scores[4])
    assert plot_scores(scores, kept=[], ax=ax) is ax


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"`plot_scores` needs matplotlib: `pip install 'p2d_peft\[plots\]'`"):
        plot_scores(torch.ones(2), kept=[1])
