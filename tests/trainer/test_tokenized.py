import pytest
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from p2d_peft.trainer.tokenized import tokenized

from ..tiny_data import prompt_completion
from .test_p2d_trainer import trainer


class WithoutTheFirstTokens:
    """A collator as in older notebooks: it makes labels itself, and pads to a multiple of eight."""

    def __init__(self):
        self.collate = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8)

    def __call__(self, rows):
        batch = self.collate([{"input_ids": row["input_ids"]} for row in rows])
        batch["labels"][:, :3] = -100
        return batch


def test_what_trls_collator_takes_is_taken_as_it_is(tmp_path):
    run = trainer(tmp_path)
    assert tokenized(run, run.train_dataset) is run.train_dataset


def test_a_collator_of_ones_own_says_what_counts(tmp_path):
    run = trainer(tmp_path, data_collator=WithoutTheFirstTokens())
    before = run.train_dataset[:3]
    for pool in (run.train_dataset, run.train_dataset.to_iterable_dataset()):
        rows = list(tokenized(run, pool).take(3))
        assert [row["input_ids"] for row in rows] == before["input_ids"]
        assert [row["labels"] for row in rows] == [[-100] * 3 + ids[3:] for ids in before["input_ids"]]
        assert [row["prompt"] for row in rows] == before["prompt"]  # policies may ask for other columns
    run.train()
    assert len(run.train_dataset) == 16


def test_a_transform_is_applied(tmp_path):
    ids = Dataset.from_list([{"number": number} for number in range(12)])

    def transform(rows):
        return {"input_ids": [[5, 6, 7 + number] for number in rows["number"]]}

    pool = ids.with_transform(transform)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    run = trainer(tmp_path, pool=pool, target=pool.select(range(4)), changes=skip)
    assert tokenized(run, pool)["input_ids"][3] == [5, 6, 10]
    run.train()
    assert len(run.train_dataset) == 6


def test_a_collator_without_tokens_is_named(tmp_path):
    run = trainer(tmp_path, pool=prompt_completion(4), data_collator=lambda rows: {"pixels": rows})
    with pytest.raises(ValueError, match=r"`data_collator` gives batches with \['pixels'\]"):
        tokenized(run, run.train_dataset)
