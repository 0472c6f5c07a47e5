import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from p2d_peft.selection.samples import prepare_samples

from ..tiny_data import KINDS, TOOLS_TEMPLATE, conversational, prompt_completion, rows, text, with_tools
from ..tiny_models import tiny_model, tiny_tokenizer


def sft_config(tmp_path, **changes):
    return SFTConfig(str(tmp_path), bf16=False, report_to="none", **changes)


@pytest.mark.parametrize("changes", [{}, {"max_length": 14}, {"completion_only_loss": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_a_real_sft_trainer_makes(kind, changes, tmp_path):
    if kind == "pre_tokenized" and "completion_only_loss" in changes:
        pytest.skip("labels are given")
    args, dataset = sft_config(tmp_path, **changes), KINDS[kind]()
    trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tiny_tokenizer())
    expected = [
        (row["input_ids"], row["labels"]) for row in trainer.train_dataset if any(x != -100 for x in row["labels"][1:])
    ]
    samples = prepare_samples(dataset, tiny_tokenizer(), args)
    assert list(zip(samples.input_ids, samples.labels, strict=True)) == expected
    assert samples.n_rows == 24 and len(samples) == len(expected) > 0


def test_assistant_only_loss(tmp_path):
    args = sft_config(tmp_path, assistant_only_loss=True)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=conversational(), processing_class=tiny_tokenizer())
    assert prepare_samples(conversational(), tiny_tokenizer(), args).labels == trainer.train_dataset["labels"][:]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_tools(as_json, assistant_only_loss, tmp_path):
    tokenizer, dataset = tiny_tokenizer(), with_tools(as_json=as_json)
    tokenizer.chat_template = TOOLS_TEMPLATE
    args = sft_config(tmp_path, assistant_only_loss=assistant_only_loss)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer)
    samples = prepare_samples(dataset, tokenizer, args)
    assert samples.input_ids == trainer.train_dataset["input_ids"][:]
    assert samples.labels == trainer.train_dataset["labels"][:]
    assert tokenizer.decode(samples.input_ids[1]).startswith("tool counttool user ")


def test_formatting_func(tmp_path):
    def formatting_func(row):
        return f"{row['task']}: {row['question']}"

    dataset = prompt_completion().rename_column("prompt", "question").remove_columns("completion")
    args = sft_config(tmp_path)
    trainer = SFTTrainer(
        tiny_model(),
        args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        formatting_func=formatting_func,
    )
    samples = prepare_samples(dataset, tiny_tokenizer(), args, formatting_func)
    assert samples.input_ids == trainer.train_dataset["input_ids"][:]
    assert tiny_tokenizer().decode(samples.input_ids[0]).startswith("copy: copy ")


def test_rows_keep_their_numbers_when_some_have_nothing_to_learn():
    made = rows(6)
    made[1]["prompt"] = "x" * 50  # cut off before its completion
    made[4]["prompt"] = "y" * 50
    samples = prepare_samples(
        Dataset.from_list(made), tiny_tokenizer(), SFTConfig(bf16=False, report_to="none", max_length=30)
    )
    assert samples.rows == [0, 2, 3, 5] and samples.n_rows == 6


def test_batches_are_bucketed_padded_and_complete():
    samples = prepare_samples(text(), tiny_tokenizer(), SFTConfig(bf16=False, report_to="none"))
    seen, lengths = [], []
    for indices, batch in samples.batches(5, torch.device("cpu")):
        seen += indices
        lengths.append(batch["input_ids"].shape[1])
        for row, index in enumerate(indices):
            n = len(samples.input_ids[index])
            assert batch["input_ids"][row, :n].tolist() == samples.input_ids[index]
            assert batch["labels"][row, :n].tolist() == samples.labels[index]
            assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
            assert (batch["labels"][row, n:] == -100).all()
    assert sorted(seen) == list(range(24))
    assert lengths == sorted(lengths, reverse=True)


def test_the_tokenizer_and_the_arguments_stay_as_they_were():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    args = SFTConfig(bf16=False, report_to="none", eos_token="<s>", shuffle_dataset=True)
    samples = prepare_samples(text(), tokenizer, args)
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token is None and args.shuffle_dataset
    assert samples.input_ids[0][-1] == tokenizer.convert_tokens_to_ids("<s>") == samples.pad_token_id
    assert samples.rows == list(range(24))


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([{"text": "a"}], TypeError, r"`pool` must be a `datasets\.Dataset`, got list"),
        (text().to_iterable_dataset(), TypeError, "got IterableDataset"),
        (text().select([]), ValueError, "`pool` has no rows"),
        (text().rename_column("text", "body"), ValueError, r"`pool` has the columns \['body'\]"),
    ],
)
def test_bad_pools_are_named(dataset, error, message):
    with pytest.raises(error, match=message):
        prepare_samples(dataset, tiny_tokenizer(), SFTConfig(bf16=False, report_to="none"))


def test_a_processor_and_a_template_from_elsewhere_are_refused():
    with pytest.raises(TypeError, match="`processing_class` must be a tokenizer"):
        prepare_samples(text(), object(), SFTConfig(bf16=False, report_to="none"))
    with pytest.raises(ValueError, match=r"processing_class\.chat_template"):
        prepare_samples(
            text(), tiny_tokenizer(), SFTConfig(bf16=False, report_to="none", chat_template_path="other/model")
        )


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"messages": MESSAGES}, {"messages": MESSAGES[:1]}, "RuntimeError: .* at least one example has no assistant"),
        ({"messages": MESSAGES, "tools": "[]"}, {"messages": MESSAGES, "tools": "{bad"}, "JSONDecodeError: "),
    ],
)
@pytest.mark.parametrize("places", [[0], [4], [9], [3, 7]])
def test_a_row_that_trl_stumbles_over_is_named(good, bad, message, places):
    pool = Dataset.from_list([bad if row in places else good for row in range(10)])
    args = SFTConfig(bf16=False, report_to="none", assistant_only_loss=True)
    for first, number in ((0, places[0]), (100, 100 + places[0]), (list(range(0, 20, 2)), 2 * places[0])):
        with pytest.raises(ValueError, match=f"`pool` cannot be made into tokens at row {number}: {message}"):
            prepare_samples(pool, tiny_tokenizer(), args, rows=first)


def test_an_error_that_no_row_is_to_blame_for_is_left_as_it_is():
    def formatting_func(row):
        seen.append(row)
        if len(seen) == 5:
            raise OSError("for a moment")
        return row["text"]

    seen = []
    with pytest.raises(OSError, match="for a moment"):
        prepare_samples(text(), tiny_tokenizer(), SFTConfig(bf16=False, report_to="none"), formatting_func)


@pytest.mark.parametrize("kind", ["pandas", "numpy", "arrow", "torch"])
def test_another_format_is_no_other_text(kind, tmp_path):
    for dataset in (conversational(), prompt_completion()):
        expected = prepare_samples(dataset, tiny_tokenizer(), sft_config(tmp_path))
        assert prepare_samples(dataset.with_format(kind), tiny_tokenizer(), sft_config(tmp_path)) == expected
