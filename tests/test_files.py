import os

import pytest

from p2d_peft.files import read_json, write_json


def test_round_trip_makes_missing_folders(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, 2.5, None]})
    assert read_json(path) == {"x": [1, 2.5, None]}


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError):
        write_json(path, float("nan"))

    def no_replace(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, 2)
    assert read_json(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_what_is_there_already_is_left_alone(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    before = path.stat().st_ino
    write_json(path, {"x": 1})
    assert path.stat().st_ino == before
    write_json(path, {"x": 2})
    assert path.stat().st_ino != before and read_json(path) == {"x": 2}


def test_what_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(ValueError, match=r"a\.json' is not a JSON file"):
        read_json(tmp_path / "a.json")
