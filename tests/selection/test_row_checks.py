import pytest
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from p2d_peft.selection.row_checks import check_rows

from ..tiny_data import conversational, conversational_prompt_completion, pre_tokenized, prompt_completion, text
from ..tiny_models import tiny_model, tiny_tokenizer


def checked(dataset, rows=0, **args):
    check_rows(dataset, tiny_tokenizer(), SFTConfig(bf16=False, report_to="none", **args), None, "pool", rows)


def with_column(dataset, name, value):
    return dataset.add_column(name, [value] * len(dataset))


@pytest.mark.parametrize(
    "pool",
    [
        with_column(prompt_completion(6), "messages", None),
        with_column(prompt_completion(6), "conversations", None),
        with_column(text(6), "conversations", "x"),
        with_column(text(6), "conversations", 1),
        with_column(text(6), "conversations", ["x"]),
        with_column(text(6), "messages", None),
        with_column(text(6), "completion", None),
        with_column(text(6), "completion", 1),
        with_column(conversational(6), "text", None),
        with_column(conversational_prompt_completion(6), "text", None),
        text(6).cast_column("text", Value("string_view")),
    ],
    ids=lambda pool: str(list(pool.features.items())[-2:]),
)
def test_columns_that_sft_trainer_does_not_read_may_hold_anything(pool, tmp_path):
    checked(pool)
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none", use_cpu=True)
    SFTTrainer(tiny_model(), args, train_dataset=pool, processing_class=tiny_tokenizer())


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (with_column(prompt_completion(2), "text", None), "`pool` has no value in the column 'text' in 2 of 2 rows"),
        (with_column(text(2), "prompt", None), "`pool` has no value in the column 'prompt' in 2 of 2 rows"),
        (Dataset.from_dict({"messages": ["x"]}), "must hold a list of messages .* string"),
    ],
)
def test_columns_that_it_reads_may_not(pool, message):
    with pytest.raises(ValueError, match=message):
        checked(pool)


GOOD, MANY = [{"role": "user", "content": "hi"}], 30


@pytest.mark.parametrize(
    ("column", "good", "bad", "message"),
    [
        ("messages", GOOD, [], "has an empty list in the column 'messages'"),
        ("messages", GOOD, None, "has no value in the column 'messages'"),
        ("input_ids", [7, 8], None, "has no value in the column 'input_ids'"),
        ("input_ids", [7, 8], [7, None], "lacks a number within the list in the column 'input_ids'"),
        ("labels", [7, 8], None, "has no value in the column 'labels'"),
        ("labels", [7, 8], [7, None], "lacks a number within the list in the column 'labels'"),
        ("assistant_masks", [0, 1], None, "has no value in the column 'assistant_masks'"),
        ("completion_mask", [0, 1], None, "has no value in the column 'completion_mask'"),
    ],
)
def test_rows_with_nothing_in_them_are_named(column, good, bad, message):
    columns = {column: [good] * MANY + [bad]}
    if column != "messages":
        columns = {"input_ids": [[7, 8]] * (MANY + 1)} | columns
    pool = Dataset.from_dict(columns)
    for rows, number in ((0, MANY), (1000, 1000 + MANY), (list(range(5, 5 + MANY + 1)), 5 + MANY)):
        with pytest.raises(ValueError, match=rf"`pool` {message} in 1 of {MANY + 1} rows: rows {number}\."):
            checked(pool, rows, completion_only_loss=True)
    # what was left out does not count, and what is there has the numbers that it has now
    checked(pool.select([0, 3, 1]), completion_only_loss=True)
    with pytest.raises(ValueError, match=rf"`pool` {message} in 1 of 2 rows: rows 0\."):
        checked(pool.select([MANY, 3]), completion_only_loss=True)


def test_masks_that_no_labels_are_made_of_may_be_missing():
    checked(with_column(pre_tokenized(4), "assistant_masks", None))
    checked(with_column(pre_tokenized(4).remove_columns("labels"), "completion_mask", None))


def test_messages_may_be_of_any_make():
    features = Features({"messages": List(Json())})
    checked(Dataset.from_dict({"messages": [GOOD, GOOD]}, features=features))
    with pytest.raises(ValueError, match="has an empty list in the column 'messages' in 1 of 2 rows: rows 1"):
        checked(Dataset.from_dict({"messages": [GOOD, []]}, features=features))
    parts = [conversational(3), conversational(3, seed=1).shuffle(seed=0)]
    checked(concatenate_datasets(parts).with_format("torch"))
