import importlib.util
import random

import pytest

from p2d_peft.selection.policies import WithoutNearDuplicates, without_near_duplicates

from .rankings import ranking


def words(n, seed):
    draw = random.Random(seed)
    return [draw.randrange(30_000) for _ in range(n)]


def shingles(ids):
    return {tuple(ids[start : start + 5]) for start in range(len(ids) - 4)}


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def changed(ids, n, seed=0):
    """The same with a piece of `n` tokens at the end written anew."""
    return [*ids[: len(ids) - n], *words(n, seed + 1000)]


def test_the_better_of_two_copies_stays():
    tokens = [words(50, 0), words(50, 1), words(50, 0), words(50, 2), changed(words(50, 1), 2)]
    assert list(WithoutNearDuplicates()([4, 3, 2, 1, 0], ranking(5, tokens=tokens))) == [4, 3, 2]


def test_drops_what_is_more_alike_than_the_threshold_and_nothing_else():
    """Far enough from the threshold for the error of the estimate, all of 100 pairs are judged rightly."""
    originals = [words(200, seed) for seed in range(100)]
    for n_changed, alike in ((6, True), (80, False)):
        copies = [changed(ids, n_changed, seed) for seed, ids in enumerate(originals)]
        similarity = [jaccard(a, b) for a, b in zip(originals, copies, strict=True)]
        assert (min(similarity) > 0.9) if alike else (max(similarity) < 0.6)
        given = ranking(200, tokens=[*originals, *copies])
        assert list(WithoutNearDuplicates(0.75)(range(200), given)) == list(range(100 if alike else 200))


def test_a_threshold_of_one_takes_nothing_but_the_same_sets():
    tokens = [words(50, 0), changed(words(50, 0), 1), words(50, 0)]
    assert list(WithoutNearDuplicates(1.0)(range(3), ranking(3, tokens=tokens))) == [0, 1]
    short = [[5], [5], [5, 6], [5, 6, 7, 8], [5, 6, 7, 8]]  # shorter than a shingle
    assert list(WithoutNearDuplicates()(range(5), ranking(5, tokens=short))) == [0, 2, 3]
    assert list(WithoutNearDuplicates(1e-3)(range(3), ranking(3, tokens=tokens))) == [0]


def test_rows_are_read_in_parts_and_only_as_far_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(without_near_duplicates, "CHUNK_ROWS", 10)
    asked, tokens = [], [words(20, seed // 2) for seed in range(200)]
    rows = WithoutNearDuplicates()(range(200), ranking(200, 7, tokens=tokens, asked=asked))
    assert [next(rows) for _ in range(7)] == [0, 2, 4, 6, 8, 10, 12]
    assert asked == [list(range(10)), list(range(10, 20))]


def test_the_same_seed_gives_the_same_rows():
    tokens = [changed(words(60, 0), 3 * n, n) for n in range(20)]  # many of them near the threshold
    found = {
        seed: [list(WithoutNearDuplicates(0.6)(range(20), ranking(20, tokens=tokens, seed=seed))) for _ in range(2)]
        for seed in (0, 1, 2**40)
    }
    assert all(a == b for a, b in found.values())


@pytest.mark.parametrize("threshold", [0, 1.01, float("nan")])
def test_bad_thresholds_are_named(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\], got"):
        WithoutNearDuplicates(threshold)


def test_a_missing_library_shows_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs datasketch: pip install 'p2d_peft\[dedup\]'"):
        WithoutNearDuplicates()
