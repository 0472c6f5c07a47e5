import sys

import matplotlib.image
import pytest

from p2d_peft.report.pictures import PICTURE_NAMES, save_pictures
from p2d_peft.report.run_folder import Run

from .run_folders import write_run
from .test_run_report import report


def test_the_same_run_gives_the_same_pictures(tmp_path):
    run = Run.read(write_run(tmp_path, text=" $x_1$ _a \\frac{"))
    (tmp_path / "again").mkdir()
    said = save_pictures(tmp_path, run)
    assert tuple(said) == PICTURE_NAMES
    again = save_pictures(tmp_path / "again", Run(run.report, curves=run.curves))
    assert list(again) == ["p2d_costs.png", "p2d_curves.png"]
    for name in again:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in PICTURE_NAMES:
        height, width, _ = matplotlib.image.imread(tmp_path / name).shape
        assert width == 960 and height > 200
    # the words go into markdown, and are ours
    assert said["p2d_curves.png"] == "Curves of the training: loss and share of tokens predicted right"


def test_what_an_earlier_run_left_gives_way(tmp_path):
    for name in PICTURE_NAMES:
        (tmp_path / name).touch()
    assert list(save_pictures(tmp_path, Run(report()))) == ["p2d_costs.png"]
    assert [name for name in PICTURE_NAMES if (tmp_path / name).exists()] == ["p2d_costs.png"]


def test_without_matplotlib_there_is_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'p2d_peft\[plots\]'"):
        save_pictures(tmp_path, Run(report()))
