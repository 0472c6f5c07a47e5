import json

import pytest

from p2d_peft.efficiency import Reference, StageCosts
from p2d_peft.heads import HeadSet
from p2d_peft.trainer.state import P2DState, digest_of_rows

from ..tiny_data import pre_tokenized, text


@pytest.mark.parametrize("reference", [None, Reference(3.5, "estimated", 0.1)])
@pytest.mark.parametrize("heads", [None, HeadSet([(0, 1), (11, 3)])])
def test_round_trip(heads, reference, tmp_path):
    state = P2DState(heads, "proxy", "affinity", [1, 5], [0.1, 1 / 3], 20, 300, 33, reference, HeadSet([(0, 2)]), "ab")
    costs = StageCosts({"localize": 1.5, "train": 2.0}, {"localize": 10}, {"localize": 20, "train": 30})
    state.save(tmp_path, costs)
    assert P2DState.load(tmp_path) == (state, costs)


def test_checkpoints_of_earlier_versions_have_the_seconds_alone(tmp_path):
    state = P2DState(None, None, "random", [1], [0.1], 20, 300, 33, None)
    state.save(tmp_path, StageCosts({"select": 1.5}, {"select": 10}, {"select": 20}))
    data = json.loads((tmp_path / "p2d_state.json").read_text())
    del data["stage_tokens"], data["stage_peak_memory"], data["scoring_heads"], data["rows_digest"]
    (tmp_path / "p2d_state.json").write_text(json.dumps(data))
    assert P2DState.load(tmp_path) == (state, StageCosts({"select": 1.5}))


def test_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no p2d_state\.json: P2DTrainer did not write this checkpoint"):
        P2DState.load(tmp_path)
    (tmp_path / "p2d_state.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not the state of a P2D run"):
        P2DState.load(tmp_path)


def test_rows_are_known_by_their_tokens_and_their_order():
    rows = pre_tokenized(12)
    digest = digest_of_rows(rows)
    assert digest == digest_of_rows(rows.select_columns("input_ids").with_format("torch"))
    assert digest != digest_of_rows(rows.select(range(11))) and digest != digest_of_rows(
        rows.select(range(11, -1, -1))
    )
    assert digest_of_rows(text(12)) is None and digest_of_rows(rows.to_iterable_dataset()) is None
