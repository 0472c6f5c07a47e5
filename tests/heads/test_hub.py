"""Folders, and no connection; the Hub itself is in tests/trainer/test_hub.py."""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from p2d_peft.heads import HeadSet
from p2d_peft.heads.hub import find_file


def test_folders_and_subfolders(tmp_path):
    heads = HeadSet([(0, 1), ("encoder.3", 2)])
    heads.save_pretrained(tmp_path / "new" / "sub")
    assert [path.name for path in (tmp_path / "new" / "sub").iterdir()] == ["p2d_heads.json"]
    assert HeadSet.from_pretrained(tmp_path / "new" / "sub") == heads
    assert HeadSet.from_pretrained(str(tmp_path / "new"), subfolder="sub") == heads
    with pytest.raises(FileNotFoundError, match=r"The folder '.*new' has no 'p2d_heads\.json'"):
        HeadSet.from_pretrained(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"The folder '.*new' has no 'other/p2d_heads\.json'"):
        HeadSet.from_pretrained(tmp_path / "new", subfolder="other")


def test_no_connection_is_not_taken_for_no_file():
    with pytest.raises(LocalEntryNotFoundError):
        find_file("user/name", "p2d_heads.json", None, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not a JSON file"),
        ("9" * 5000, "not a JSON file"),
        (json.dumps([1]), "holds no head set"),
        (json.dumps({"0": [1]}), "expected a mapping with 'format'"),
        *(
            (json.dumps({"format": "p2d_peft.HeadSet", "heads": heads}), message)
            for heads, message in [
                ({"0": 3}, "a list of heads, got 3 for '0'"),
                ({"0": "12"}, "a list of heads, got '12' for '0'"),
                ({"0": [1.5]}, r"pairs of integers, got \(0, 1\.5\)"),
                ({"0": [[1]]}, "pairs of integers"),
                ({"0": [None]}, "pairs of integers"),
                ({"0": [True]}, "pairs of integers"),
                ({"0": [-1]}, "counted from 0"),
                ({"0": [1, 1]}, "more than once"),
                ({"-1": [1]}, "pairs of integers"),
                ({"../x": [1]}, "pairs of integers"),
                ({"9" * 5000: [1]}, "holds no head set"),
            ]
        ),
    ],
)
def test_strange_files_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "p2d_heads.json").write_text(content)
    with pytest.raises(ValueError, match=rf"p2d_heads\.json'.*{message}"):
        HeadSet.from_pretrained(tmp_path)
