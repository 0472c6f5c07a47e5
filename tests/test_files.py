import os

import pytest

from p2d_peft.files import check_new, read_json, replacing, unfinished, write_json


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


def test_a_finished_folder_takes_its_name_and_can_be_read_by_others(tmp_path):
    target = tmp_path / "new" / "folder"
    with unfinished(target) as path:
        path.mkdir()
        (path / "a.txt").write_text("whole")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "whole" and [target] == list(target.parent.iterdir())
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_nothing_and_what_is_there_stays(tmp_path):
    with pytest.raises(RuntimeError), unfinished(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.txt").write_text("precious")
    for act in (check_new, lambda path: unfinished(path).__enter__()):
        with pytest.raises(ValueError, match=r"a\.txt' exists already; give another name"):
            act(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "precious"


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    """As two containers with a shared folder may have processes of the same number."""
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write_text("1")
        with replacing(path) as second:
            second.write_text("2")
        assert path.read_text() == "2"
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]
