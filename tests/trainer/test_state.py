import json

import pytest

from p2d_peft.efficiency import Reference
from p2d_peft.heads import HeadSet
from p2d_peft.trainer.state import P2DState


@pytest.mark.parametrize("reference", [None, Reference(3.5, "estimated", 0.1)])
@pytest.mark.parametrize("heads", [None, HeadSet([(0, 1), (11, 3)])])
def test_round_trip(heads, reference, tmp_path):
    state = P2DState(heads, "proxy", [1, 5], [0.1, 1 / 3], 20, 300, 33, reference)
    state.save(tmp_path, {"localize": 1.5})
    assert P2DState.load(tmp_path) == (state, {"localize": 1.5})


def test_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no p2d_state\.json: P2DTrainer did not write this checkpoint"):
        P2DState.load(tmp_path)
    (tmp_path / "p2d_state.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not the state of a P2D run"):
        P2DState.load(tmp_path)
