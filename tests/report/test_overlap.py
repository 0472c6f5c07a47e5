import pytest

from p2d_peft.heads import HeadScores, HeadSet
from p2d_peft.report.overlap import compare_heads
from p2d_peft.report.run_folder import Run
from p2d_peft.report.text import overlap_text

from .run_folders import head_scores
from .test_run_report import report


def run(heads, scores=None, **changes):
    return Run(report(**changes), heads=heads, scores=scores)


def test_heads_in_common_beside_those_of_chance():
    scores = head_scores()
    overlap = compare_heads(run(HeadSet([(0, 0), (1, 1), (2, 2)]), scores), run(HeadSet([(1, 1), (2, 0)]), scores))
    assert (overlap.both, overlap.ours, overlap.theirs, overlap.chance) == (1, 3, 2, 0.5)
    assert overlap.spearman == pytest.approx(1) and overlap.same_model
    text = overlap_text(overlap)
    assert "1, of 3 here and 2 in the other run" in text and "0.5 on average" in text and "correlation 1.00" in text


def test_without_scores_of_both_there_is_no_correlation():
    ours, heads = head_scores(), HeadSet([(0, 0)])
    assert compare_heads(run(heads, ours), run(heads)).spearman is None
    other = HeadScores(ours.values[:3], "proxy")
    overlap = compare_heads(run(heads, ours), run(heads, other, model="org/other"))
    assert overlap.spearman is None and not overlap.same_model
    assert "correlation" not in overlap_text(overlap)


def test_runs_that_cannot_be_compared():
    heads = HeadSet([(0, 0)])
    with pytest.raises(ValueError, match="one of the two has none"):
        compare_heads(run(heads), run(None))
    with pytest.raises(ValueError, match=r"unlike heads: 12 in 'org/name' and 16 in 'org/x'"):
        compare_heads(run(heads), run(heads, n_heads=16, model="org/x"))
