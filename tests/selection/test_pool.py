import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset, load_from_disk

from p2d_peft.selection.pool import column_of, in_memory, kept_rows, ranked, rows_of

from ..tiny_data import prompt_completion, rows


def stream(n=24):
    def generate():
        yield from rows(n)

    return IterableDataset.from_generator(generate)


def test_ranked_puts_equal_scores_by_row_number_and_leaves_out_what_has_none():
    assert ranked(torch.tensor([1.0, math.nan, 2.0, 1.0, math.nan, 2.0], dtype=torch.float64)) == [2, 5, 0, 3]


@pytest.mark.parametrize("chosen", [[0], [3, 4, 23]])
def test_rows_of_a_stream_are_those_of_a_dataset(chosen):
    expected = prompt_completion().select(chosen).to_list()
    assert rows_of(prompt_completion(), chosen).to_list() == expected
    assert rows_of(prompt_completion().to_iterable_dataset(), chosen).to_list() == expected
    assert rows_of(stream(), chosen).to_list() == expected


def test_a_stream_is_read_no_further_than_to_the_last_row():
    read = []

    def generate():
        for index in range(100):
            read.append(index)
            yield {"text": str(index)}

    assert rows_of(IterableDataset.from_generator(generate), [2, 5])["text"][:] == ["2", "5"]
    assert max(read) <= 6


def test_a_formatted_stream_gives_plain_rows():
    numbers = Dataset.from_dict({"number": [3, 1, 2]}).to_iterable_dataset().with_format("torch")
    assert rows_of(numbers, [1, 2]).to_list() == [{"number": 1}, {"number": 2}]
    assert column_of(numbers, "number") == [3, 1, 2]


def test_columns_of_all_kinds_of_pools():
    expected = [row["task"] for row in rows()]
    for pool in (prompt_completion(), prompt_completion().to_iterable_dataset(), stream()):
        assert column_of(pool, "task") == expected


def test_a_copy_in_memory_holds_the_same_and_has_no_files(tmp_path):
    features = Features({"text": Value("string"), "kind": ClassLabel(names=["a", "b"])})
    pool = Dataset.from_dict({"text": ["x", "y"], "kind": [1, 0]}, features=features)
    pool.save_to_disk(tmp_path / "pool")
    on_disk = load_from_disk(tmp_path / "pool").with_format("torch")
    assert on_disk.cache_files
    copy = in_memory(on_disk)
    assert not copy.cache_files
    assert copy.features == features and copy.to_list() == pool.to_list()


def test_an_earlier_score_is_replaced(tmp_path):
    prompt_completion(3).to_parquet(tmp_path / "pool.parquet")
    pool = load_dataset("parquet", data_files=str(tmp_path / "pool.parquet"), split="train", cache_dir=str(tmp_path))
    once = kept_rows(pool, [1.0, 2.0, 3.0])
    assert kept_rows(once.select([0, 2]), [5.0, 6.0]).to_list() == [
        {**row, "p2d_score": score} for row, score in zip(pool.select([0, 2]), [5.0, 6.0], strict=True)
    ]
