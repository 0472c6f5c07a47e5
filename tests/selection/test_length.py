from datasets import Dataset

from p2d_peft.selection import length

from ..tiny_models import tiny_model
from .direct import samples_of, scored


def test_counts_the_tokens_that_are_learned():
    pool = Dataset.from_list([{"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "defg"}])
    # single characters, and the end
    assert scored(length.SCORER, tiny_model(), samples_of(pool)).scores.tolist() == [3, 5]


def test_the_first_token_is_learned_from_nothing():
    assert scored(length.SCORER, tiny_model(), samples_of(Dataset.from_list([{"text": "abc"}]))).scores.tolist() == [3]
