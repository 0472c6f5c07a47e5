from p2d_peft import HeadScores


def test_heads_are_found_and_written(folder, heads):
    scores = HeadScores.load(folder / "scores.json")
    assert scores.method == "taylor" and scores.n_samples == 4
    assert heads == scores.top(0.3, per_layer="even", per_group=1)
    assert len(heads) == round(0.3 * scores.n_heads)
    assert (folder / "heads.png").stat().st_size > 1000
