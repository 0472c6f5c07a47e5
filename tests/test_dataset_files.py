import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from p2d_peft.dataset_files import read_dataset, write_dataset

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


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "rows.jsonl").write_text("precious")
    with pytest.raises(ValueError, match=r"rows\.jsonl' exists already; give another name"):
        write_dataset(prompt_completion(2), tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "precious"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, path):
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
