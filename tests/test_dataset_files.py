import re
from datetime import datetime

import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value

from p2d_peft.dataset_files import check_new_dataset, is_local, is_whole, read_dataset, write_dataset

from .tiny_data import conversational, prompt_completion


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "folder"])
def test_what_is_written_is_read_back(name, tmp_path):
    dataset = prompt_completion(5)
    write_dataset(dataset, tmp_path / "new" / name)
    assert read_dataset(str(tmp_path / "new" / name)).to_list() == dataset.to_list()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]  # nothing unfinished lies about


def test_nested_rows_survive(tmp_path):
    for name in ("rows.jsonl", "rows.parquet", "folder"):
        write_dataset(conversational(3), tmp_path / name)
        assert read_dataset(str(tmp_path / name)).to_list() == conversational(3).to_list()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_numbers_and_dates_survive(name, tmp_path):
    when = datetime(2026, 1, 2, 3, 4, 5, 678901)
    dataset = Dataset.from_dict(
        {"count": [1, None, 3], "score": [1e-12 / 3, 1 / 3, None], "text": ['a "quoted", one', "two\nlines", "third"]}
        | {"when": [when] * 3, "right": [True, None, False]}
    )
    write_dataset(dataset, tmp_path / name)
    again = read_dataset(str(tmp_path / name))
    assert again["text"][:] == dataset["text"][:] and again["count"][:] == dataset["count"][:]
    assert again["right"][:] == dataset["right"][:]
    assert again["score"][1] == pytest.approx(1 / 3, abs=1e-15)
    assert again["score"][0] == pytest.approx(1e-12 / 3, abs=1e-15)
    assert str(when.microsecond) in str(again["when"][0]) and "2026-01-02" in str(again["when"][0])
    assert re.fullmatch(r".*\b1\b.*", (tmp_path / name).read_text().splitlines()[name == "rows.csv"])


def test_csv_is_for_flat_rows(tmp_path):
    with pytest.raises(ValueError, match=r"CSV cannot hold the column 'messages', which is nested; take \.jsonl"):
        write_dataset(conversational(3), tmp_path / "rows.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.JSONL"])
@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (Value("binary"), b"\xff"),
        (Value("large_binary"), b"\xff"),
        (List({"of": Value("binary")}), [{"of": b"\xff"}]),
        (Image(), {"bytes": b"\xff", "path": None}),
    ],
)
def test_bytes_are_not_for_files_of_text(name, feature, value, tmp_path):
    features = Features({"text": Value("string"), "thumb": feature})
    dataset = Dataset.from_dict({"text": ["a"], "thumb": [value]}, features=features)
    message = r"(JSONL|CSV) cannot hold the column 'thumb', which holds bytes; take \.parquet or a folder"
    with pytest.raises(ValueError, match=message):
        check_new_dataset(tmp_path / name, features)
    with pytest.raises(ValueError, match=message):
        write_dataset(dataset, tmp_path / name)
    for able in ("rows.parquet", "folder"):
        check_new_dataset(tmp_path / able, features)


def test_csv_has_no_string_views(tmp_path):
    dataset = prompt_completion(2).cast_column("prompt", Value("string_view"))
    with pytest.raises(
        ValueError, match=r"CSV cannot hold the column 'prompt', which is of type string_view; take \.js"
    ):
        write_dataset(dataset, tmp_path / "rows.csv")
    write_dataset(dataset, tmp_path / "rows.jsonl")
    assert read_dataset(str(tmp_path / "rows.jsonl")).to_list() == prompt_completion(2).to_list()


def test_endings_are_those_that_are_read_in_small_or_capital_letters(tmp_path):
    write_dataset(prompt_completion(3), tmp_path / "rows.JSONL")
    assert read_dataset(f"{tmp_path}/rows.JSONL").to_list() == prompt_completion(3).to_list()
    for name in ("rows.txt", "rows.jsonl.gz"):
        (tmp_path / name).write_text("a")
        with pytest.raises(
            ValueError, match=rf"{name}' is not read: a file is one of \.jsonl, \.json, \.parquet, \.csv"
        ):
            read_dataset(f"{tmp_path}/{name}")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "rows.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"rows\.jsonl' exists already; give another name"):
        write_dataset(prompt_completion(2), tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, path, **_):
        open(path, "w").write("half")
        raise OSError("disk full")

    monkeypatch.setattr(Dataset, "to_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(prompt_completion(2), tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_splits_are_named(tmp_path):
    DatasetDict(train=prompt_completion(3), test=prompt_completion(2)).save_to_disk(str(tmp_path / "both"))
    assert len(read_dataset(f"{tmp_path}/both:test")) == 2
    with pytest.raises(ValueError, match=r"has the splits train, test; name one: '.*both:train'"):
        read_dataset(f"{tmp_path}/both")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'no\.jsonl'"):
        read_dataset("no.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "saved", "plain"])
def test_any_source_can_be_streamed(name, tmp_path):
    if name == "plain":  # a folder of files, for `load_dataset` itself
        write_dataset(prompt_completion(4), tmp_path / name / "train.jsonl")
    else:
        write_dataset(prompt_completion(4), tmp_path / name)
    stream = read_dataset(str(tmp_path / name), split="train", streaming=True)
    assert isinstance(stream, IterableDataset) and list(stream) == prompt_completion(4).to_list()


def test_a_split_by_itself_leaves_colons_alone(tmp_path):
    DatasetDict(train=prompt_completion(3), test=prompt_completion(2)).save_to_disk(str(tmp_path / "a:b"))
    assert len(read_dataset(f"{tmp_path}/a:b", split="test")) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "saved"])
def test_a_split_or_a_configuration_that_is_not_there_is_not_passed_over(name, tmp_path):
    write_dataset(prompt_completion(4), tmp_path / name)
    source = str(tmp_path / name)
    assert len(read_dataset(f"{source}:train")) == len(read_dataset(source, split="train")) == 4
    for split in ("test", "nonexistent[:3]", "train2"):
        with pytest.raises(ValueError, match=f"{name}' has no split '{re.escape(split)}': all of it is 'train'"):
            read_dataset(source, split=split)
        with pytest.raises(ValueError, match=f"{name}' has no split '{re.escape(split)}': all of it is 'train'"):
            read_dataset(f"{source}:{split}")
    with pytest.raises(ValueError, match=f"{name}' has no configurations, got 'zzz'; leave it out"):
        read_dataset(source, "zzz", "train")


def test_a_file_can_be_sliced(tmp_path):
    write_dataset(prompt_completion(8), tmp_path / "rows.jsonl")
    assert read_dataset(f"{tmp_path}/rows.jsonl", split="train[2:5]").to_list() == prompt_completion(8).to_list()[2:5]
    assert len(read_dataset(f"{tmp_path}/rows.jsonl:train[:25%]")) == 2
    with pytest.raises(ValueError, match=r"rows\.jsonl' cannot be read: .*test"):
        read_dataset(f"{tmp_path}/rows.jsonl", split="train[:3]+test")
    write_dataset(prompt_completion(8), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved' has no split 'train\[:3\]'"):
        read_dataset(f"{tmp_path}/saved", split="train[:3]")


def test_splits_of_a_folder_have_no_configurations(tmp_path):
    DatasetDict(train=prompt_completion(3)).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="splits' has no configurations, got 'zzz'"):
        read_dataset(f"{tmp_path}/splits", "zzz", "train")


def test_what_has_no_splits_and_what_is_local(tmp_path):
    write_dataset(prompt_completion(3), tmp_path / "one")
    DatasetDict(train=prompt_completion(3)).save_to_disk(str(tmp_path / "splits"))
    write_dataset(prompt_completion(3), tmp_path / "plain" / "train.jsonl")
    sources = [f"{tmp_path}/one", f"{tmp_path}/splits", f"{tmp_path}/plain", "no.jsonl", "trl-lib/Capybara"]
    assert [is_whole(source) for source in sources] == [True, False, False, True, False]
    assert [is_local(source) for source in sources] == [True, True, True, True, False]
