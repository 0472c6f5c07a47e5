import pytest

from p2d_peft import HeadScores, HeadSet
from p2d_peft.cli import main
from p2d_peft.heads.random import random_scores


def test_heads_are_found_and_written(folder, heads):
    scores = HeadScores.load(folder / "scores.json")
    assert scores.method == "taylor" and scores.n_samples == 4
    assert heads == scores.top(0.3, per_layer="even", per_group=1)
    assert len(heads) == round(0.3 * scores.n_heads)
    assert (folder / "heads.png").stat().st_size > 1000


def test_heads_of_the_last_layers(folder, heads, capsys):
    command = ["heads", "--model", f"{folder}/model", "--data", f"{folder}/target.parquet", "--method", "magnitude"]
    files = ["--output", f"{folder}/last.json", "--scores", f"{folder}/all.json"]
    assert main([*command, "--last-layers", "0.33", *files]) == 0
    scores = HeadScores.load(folder / "all.json")
    found = HeadSet.load(folder / "last.json")
    assert found == scores.top(0.1, per_layer="even", last_layers=0.33) and found.layers == (len(scores.values) - 1,)
    with pytest.raises(SystemExit):
        main([*command, "--last-layers", "0.33", "--first-layers", "0.33", *files])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--per-layer", "1", "--ratio", "0.5"], ["--per-group", "1", "--ratio", "0.9"]])
def test_heads_that_cannot_be_had_are_refused_before_they_are_looked_for(options, folder, capsys, monkeypatch):
    monkeypatch.setattr("p2d_peft.heads.localize._METHODS", {"random": random_scores, "gate": pytest.fail})
    command = ["heads", "--model", f"{folder}/model", "--data", f"{folder}/target.parquet", "--method", "gate"]
    assert main([*command, "--output", f"{folder}/none.json", *options]) == 2
    assert "ask for fewer heads" in capsys.readouterr().err
