import sys

import matplotlib.image
import numpy as np
import pytest
import torch

from p2d_peft.heads import HeadScores, HeadSet, ModelGeometry
from p2d_peft.report.head_map import save_head_map

from ..tiny_models import LAYOUTS, tiny_model


@pytest.fixture(scope="module")
def geometry():
    return ModelGeometry.of(tiny_model())


def dark(path):
    """The share of dark blue, of which chosen heads are without scores."""
    red, green, blue = np.moveaxis(matplotlib.image.imread(path)[..., :3], -1, 0)
    return float(((red < 0.1) & (green < 0.3) & (blue > 0.3)).mean())


def test_the_same_heads_give_the_same_file(geometry, tmp_path):
    heads, scores = HeadSet([(0, 1), (2, 3)]), HeadScores(torch.rand(3, 4), "proxy")
    for name in ("a.png", "b.png"):
        save_head_map(tmp_path / name, heads, geometry, scores)
    save_head_map(tmp_path / "c.png", HeadSet([(0, 2)]), geometry, scores)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c and a.startswith(b"\x89PNG")


def test_without_scores_the_chosen_heads_are_dark(geometry, tmp_path):
    for n in (1, 4):
        save_head_map(tmp_path / f"{n}.png", HeadSet((0, head) for head in range(n)), geometry)
    one, four = dark(tmp_path / "1.png"), dark(tmp_path / "4.png")
    assert 0 < 3 * one < four < 5 * one


def test_layers_without_heads_and_several_stacks(tmp_path):
    for name in ("t5", "jamba"):
        geometry = ModelGeometry.of(LAYOUTS[name].model())
        save_head_map(tmp_path / f"{name}.png", HeadSet(list(geometry.heads)[:1]), geometry)
        assert dark(tmp_path / f"{name}.png") > 0


def test_a_missing_matplotlib_is_named(geometry, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"picture of the heads needs matplotlib: `pip install 'p2d_peft\[plots\]'`"):
        save_head_map(tmp_path / "a.png", HeadSet([(0, 1)]), geometry)
