import math

import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset, load_from_disk
from pyarrow import parquet

from p2d_peft.selection import P2DDataSelector
from p2d_peft.selection import pool as pool_module
from p2d_peft.selection.pool import column_of, in_memory, kept_rows, ranked, rows_of

from ..tiny_data import prompt_completion, rows
from ..tiny_models import tiny_model, tiny_tokenizer


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


def test_rows_of_a_stream_become_a_dataset_some_at_a_time(monkeypatch):
    """Where it says of which types they are; else they would be taken for those of each part."""
    expected = prompt_completion().select(range(1, 20)).to_list()
    made = []
    monkeypatch.setattr(pool_module, "ROWS_AT_ONCE", 4)
    dataset_of = pool_module.dataset_of
    monkeypatch.setattr(pool_module, "dataset_of", lambda rows, pool: made.append(len(rows)) or dataset_of(rows, pool))
    typed = prompt_completion().to_iterable_dataset()
    assert typed.features is not None and stream().features is None
    for pool, parts in ((typed, [4, 4, 4, 4, 3]), (stream(), [19])):
        found = rows_of(pool, list(range(1, 20)))
        assert found.to_list() == expected and made == parts
        made.clear()
    assert rows_of(typed, list(range(8))).to_list() == prompt_completion().select(range(8)).to_list()
    assert made == [4, 4]


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


def test_numbers_that_only_an_unsigned_integer_holds_are_kept(tmp_path):
    numbers = [2**63 + 5, None, 2**64 - 1]
    table = pa.table({"text": ["a", "b", "c"], "hash": pa.array(numbers, pa.uint64())})
    parquet.write_table(
        table.append_column("more", pa.array([numbers] * 3, pa.list_(pa.uint64()))), tmp_path / "p.parquet"
    )

    def read(streaming):
        files, cache = str(tmp_path / "p.parquet"), str(tmp_path / "cache")
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=cache)

    expected = [{"text": t, "hash": n, "more": numbers} for t, n in zip("abc", numbers, strict=True)]
    assert in_memory(read(False)).to_list() == in_memory(read(False).select([0, 1, 2])).to_list() == expected
    assert rows_of(read(True), [1, 2]).to_list() == expected[1:]
    assert rows_of(read(True), [1, 2]).features == read(False).features
    for pool in (read(False), read(True)):
        kept = P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="random", num_samples=3).select(pool)
        assert kept.remove_columns("p2d_score").to_list() == expected


def test_images_are_not_decoded_on_their_way():
    features = Features({"text": Value("string"), "image": Image()})
    pool = Dataset.from_dict({"text": ["x"], "image": [{"bytes": b"no image", "path": None}]}, features=features)
    assert in_memory(pool).with_format("arrow")[:].to_pylist() == pool.with_format("arrow")[:].to_pylist()


def test_a_stream_that_gives_other_rows_the_next_time_is_told():
    once = iter(rows(5))
    stream = IterableDataset.from_generator(lambda: once)
    assert len(rows_of(stream, [0, 4])) == 2
    with pytest.raises(
        ValueError, match="`pool` gave no row 0 this time: a stream has to give the same rows each time"
    ):
        rows_of(stream, [0, 4])


def test_an_earlier_score_is_replaced(tmp_path):
    prompt_completion(3).to_parquet(tmp_path / "pool.parquet")
    pool = load_dataset("parquet", data_files=str(tmp_path / "pool.parquet"), split="train", cache_dir=str(tmp_path))
    once = kept_rows(pool, [1.0, 2.0, 3.0])
    assert kept_rows(once.select([0, 2]), [5.0, 6.0]).to_list() == [
        {**row, "p2d_score": score} for row, score in zip(pool.select([0, 2]), [5.0, 6.0], strict=True)
    ]
