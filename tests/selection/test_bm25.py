import math
import sys

import pytest
import torch
from datasets import Dataset

from p2d_peft.selection import P2DDataSelector, bm25

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer
from .direct import samples_of, scored


def test_is_bm25_over_token_ids_with_the_pool_as_corpus():
    samples, target = samples_of(), samples_of(prompt_completion(3, seed=1))
    got = scored(bm25.SCORER, tiny_model(), samples, target=target)
    documents, n = samples.input_ids, len(samples)
    mean_length = sum(map(len, documents)) / n
    expected = torch.zeros(n, 3)
    for row, document in enumerate(documents):
        for column, query in enumerate(target.input_ids):
            for token in query:  # as often as the query has it
                having = sum(token in other for other in documents)
                frequency = document.count(token)
                saturated = frequency / (frequency + 1.2 * (0.25 + 0.75 * len(document) / mean_length))
                expected[row, column] += math.log(1 + (n - having + 0.5) / (having + 0.5)) * saturated
    expected /= expected.amax(0)
    torch.testing.assert_close(got.per_target, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.scores, expected.mean(1), rtol=1e-4, atol=1e-6)


def test_the_row_that_is_the_target_comes_first():
    pool = prompt_completion()
    scores = P2DDataSelector(tiny_model(), tiny_tokenizer(), target=pool.select([5]), scorer="bm25").score(pool)
    assert scores.argmax() == 5 and scores[5] == 1


def test_a_target_that_shares_nothing_scores_nothing():
    samples = samples_of(Dataset.from_dict({"input_ids": [[7, 8, 9], [8, 9, 7]]}))
    target = samples_of(Dataset.from_dict({"input_ids": [[20, 21]]}))
    assert scored(bm25.SCORER, tiny_model(), samples, target=target).scores.tolist() == [0, 0]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"needs bm25s: `pip install 'p2d_peft\[bm25\]'`"):
        scored(bm25.SCORER, tiny_model(), samples_of(), target=samples_of())
