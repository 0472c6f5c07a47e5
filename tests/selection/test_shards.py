import pickle

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from p2d_peft.selection.samples import prepare_samples
from p2d_peft.selection.shards import ScoredShard, ShardStore, shards_of

from ..tiny_data import KINDS, prompt_completion, rows
from ..tiny_models import tiny_tokenizer
from .test_samples import sft_config


def all_rows(shards):
    return [row for shard in shards for row in shard.rows.to_list()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 24, 100, None])
def test_shards_hold_each_row_once_and_in_order(kind, size):
    pool = KINDS[kind]()
    for made in (pool, pool.to_iterable_dataset(num_shards=3)):
        shards = list(shards_of(made, size))
        assert all_rows(shards) == pool.to_list()
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert [len(shard.rows) for shard in shards[:-1]] == [size] * (len(shards) - 1)
        assert [shard.first_row for shard in shards] == list(range(0, 24, size or 24))
        assert not any(shard.rows.cache_files for shard in shards)


def test_an_empty_pool_has_no_shards():
    empty, stream = prompt_completion().select([]), IterableDataset.from_generator(lambda: iter(()))
    assert [*shards_of(empty), *shards_of(empty, None), *shards_of(stream)] == []


def test_no_more_of_a_stream_than_one_shard_is_read_ahead():
    read = []

    def generate():
        for index in range(100):
            read.append(index)
            yield {"text": str(index)}

    for shard in shards_of(IterableDataset.from_generator(generate), 10):
        assert len(shard.rows) == 10
        # `datasets` itself reads one row ahead
        assert len(read) <= shard.first_row + 10 + 1


def test_types_survive(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": 1}}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    made = [
        {
            "messages": [
                {"role": "user", "content": "add 1"},
                {"role": "assistant", "content": "yes", "tool_calls": [call] if index % 2 else None},
            ],
            "tools": [tool] if index % 2 else None,
            "kind": "ab"[index % 2],
        }
        for index in range(6)
    ]
    pool = Dataset.from_list(made, on_mixed_types="use_json").cast_column("kind", ClassLabel(names=["a", "b"]))
    pool.save_to_disk(tmp_path / "pool")
    expected = prepare_samples(pool, tiny_tokenizer(), sft_config(tmp_path))
    for made in (pool, pool.with_format("torch"), Dataset.load_from_disk(tmp_path / "pool")):
        shards = list(shards_of(made, 4))
        assert all(shard.rows.features == pool.features for shard in shards)
        assert all_rows(shards) == pool.to_list()
        found = [prepare_samples(shard.rows, tiny_tokenizer(), sft_config(tmp_path)) for shard in shards]
        assert [ids for samples in found for ids in samples.input_ids] == expected.input_ids
    assert all_rows(shards_of(pool.to_iterable_dataset(), 4)) == pool.to_list()


def test_a_stream_without_types_may_have_a_column_that_a_shards_first_row_lacks():
    def generate():
        yield {"text": "a"}
        yield {"text": "b", "source": "web"}

    stream = IterableDataset.from_generator(generate)
    assert all_rows(shards_of(stream, 2)) == [{"text": "a", "source": None}, {"text": "b", "source": "web"}]


def scored(shard, per_target=False):
    n = len(shard.rows)
    scores = torch.randn(n, dtype=torch.float64)
    scores[0] = torch.nan
    targets = torch.randn(n, 3) if per_target else None
    n_tokens = torch.arange(n, dtype=torch.int32)
    return ScoredShard(shard.index, shard.first_row, scores, n_tokens, 2, targets, seconds=1 / 3, passed_tokens=99)


def same(a, b):
    tensors = [(a.scores, b.scores), (a.n_tokens, b.n_tokens), (a.per_target, b.per_target)]
    numbers = [(x.index, x.first_row, x.n_truncated, x.seconds, x.passed_tokens) for x in (a, b)]
    return numbers[0] == numbers[1] and all(
        x is y or (x.dtype == y.dtype and torch.equal(x.nan_to_num(7), y.nan_to_num(7))) for x, y in tensors
    )


@pytest.mark.parametrize("per_target", [False, True])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, per_target):
    shards = list(shards_of(prompt_completion(), 10))
    saved = [scored(shard, per_target) for shard in shards]
    store = ShardStore(tmp_path, {"model": "a"})
    for shard, result in zip(shards, saved, strict=True):
        assert store.load(shard) is None
        store.save(shard, result)
    again = ShardStore(tmp_path, {"model": "a"})
    assert all(same(again.load(shard), result) for shard, result in zip(shards, saved, strict=True))
    # a stream of the same rows is the same pool
    streamed = shards_of(prompt_completion().to_iterable_dataset(), 10)
    assert all(same(again.load(shard), result) for shard, result in zip(streamed, saved, strict=True))
    assert ShardStore(tmp_path, {"model": "b"}).load(shards[0]) is None
    assert not list(tmp_path.glob("*/*.tmp"))


def test_another_row_is_another_shard(tmp_path):
    made = rows(10)
    (shard,) = shards_of(Dataset.from_list(made))
    store = ShardStore(tmp_path, {})
    store.save(shard, scored(shard))
    for change in ("completion", "task"):
        other = [*made[:9], {**made[9], change: made[9][change] + "!"}]
        assert store.load(next(shards_of(Dataset.from_list(other)))) is None
    assert store.load(next(shards_of(Dataset.from_list(made[:9])))) is None
    features = Features({"text": Value("string")})
    one, two = (Dataset.from_dict({"text": [text]}, features=features) for text in ("1", "2"))
    (shard,) = shards_of(one)
    store.save(shard, scored(shard))
    assert store.load(next(shards_of(two))) is None


def test_rows_with_images_are_known_again_by_what_is_in_them(tmp_path):
    image = pytest.importorskip("PIL.Image")

    def pool(color):
        rows = {"text": ["a", "b"], "image": [image.new("RGB", (4, 4), color) for _ in range(2)]}
        return Dataset.from_dict(rows, features=Features({"text": Value("string"), "image": Image()}))

    (shard,) = shards_of(pool("red"))
    store, saved = ShardStore(tmp_path, {}), scored(shard)
    store.save(shard, saved)
    assert same(store.load(next(shards_of(pool("red")))), saved)
    assert store.load(next(shards_of(pool("blue")))) is None


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file of the cache was unpickled",))


def test_a_damaged_file_is_no_shard(tmp_path, caplog):
    (shard,) = shards_of(prompt_completion())
    store = ShardStore(tmp_path, {})
    store.save(shard, scored(shard, per_target=True))
    (path,) = tmp_path.glob("*/*.arrow")
    whole = path.read_bytes()
    with caplog.at_level("WARNING", logger="p2d_peft"):
        for damaged in (b"", b"ARROW1", whole[: len(whole) // 2], whole[:-1], whole[1:], pickle.dumps(Bomb())):
            path.write_bytes(damaged)
            assert store.load(shard) is None
    assert caplog.text.count("is damaged; its rows are scored again") == 6
    found = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        loaded = store.load(shard)
        path.write_bytes(whole)
        found += loaded is None
        assert loaded is None or same(loaded, store.load(shard))  # padding, and names of things
    assert found > len(whole) / 5 / 3
