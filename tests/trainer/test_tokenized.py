import time

import pytest
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from p2d_peft import HeadSet, P2DTrainer, efficiency
from p2d_peft.trainer.tokenized import tokenized

from ..tiny_data import pre_tokenized, prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_p2d_trainer import config, trainer


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


def test_running_ones_own_collator_on_the_pool_is_charged_to_selecting(tmp_path, monkeypatch):
    collated, real_time = [], time.perf_counter

    class Slow(WithoutTheFirstTokens):
        def __call__(self, rows):
            collated.append(1_000.0)
            return super().__call__(rows)

    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: real_time() + sum(collated))
    changes = {"max_steps": 1, "reference_steps": 0}
    run = trainer(tmp_path / "a", data_collator=Slow(), changes=changes)
    assert 32_000 <= run.estimate().stage_seconds["select"] < 33_000
    run.train()
    assert 38_000 <= sum(run.report.stage_seconds[stage] for stage in ("localize", "select")) < 39_000
    assert run.report.stage_seconds["select"] >= 32_000
    run = trainer(
        tmp_path / "b", data_collator=Slow(), heads=HeadSet([(0, 1)]), changes={**changes, "data_ratio": 1.0}
    )
    run.train()
    assert set(run.report.stage_seconds) == {"train"}


@pytest.mark.parametrize("has_end", [True, False])
def test_a_collator_of_ones_own_needs_no_padding_token(has_end, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    if not has_end:
        tokenizer.eos_token = None
    run = P2DTrainer(
        tiny_model(),
        config(tmp_path, max_steps=1),
        train_dataset=pre_tokenized(16),
        processing_class=tokenizer,
        data_collator=WithoutTheFirstTokens(),
    )
    assert run.pad_token_id == (tokenizer.eos_token_id if has_end else 0)
    run.train()
    assert run.report.aer > 0


def test_a_collator_without_tokens_is_named(tmp_path):
    run = trainer(tmp_path, pool=prompt_completion(4), data_collator=lambda rows: {"pixels": rows})
    with pytest.raises(ValueError, match=r"`data_collator` gives batches with \['pixels'\]"):
        tokenized(run, run.train_dataset)
