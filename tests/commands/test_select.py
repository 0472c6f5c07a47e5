import json

import pytest
from datasets import load_from_disk

from p2d_peft import P2DDataSelector
from p2d_peft.cli import main
from p2d_peft.selection.policies import RoundRobin

from ..tiny_data import conversational, prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("output", ["selected.jsonl", "selected"])
def test_select_writes_what_the_selector_selects(folder, heads, output, capsys):
    files = [
        "--pool",
        f"{folder}/pool.jsonl",
        "--target",
        f"{folder}/target.parquet",
        "--heads",
        f"{folder}/heads.json",
    ]
    model = ["--model", f"{folder}/model", "--dtype", "float32"]
    options = ["--ratio", "0.25", "--show", "3", "--plot", f"{folder}/{output}.svg"]
    turns = output.endswith(".jsonl")
    options += [] if turns else ["--no-round-robin"]
    assert main(["select", *model, *files, *options, "--output", f"{folder}/{output}"]) == 0
    selector = P2DDataSelector(
        tiny_model(),
        tiny_tokenizer(),
        heads=heads,
        target=prompt_completion(6, seed=1),
        ratio=0.25,
        policies=[RoundRobin()] if turns else [],
    )
    expected = selector.select(prompt_completion()).to_list()
    if turns:
        written = [json.loads(line) for line in (folder / output).read_text().splitlines()]
    else:
        written = load_from_disk(str(folder / output)).to_list()
    assert [{**row, "p2d_score": pytest.approx(row["p2d_score"], rel=1e-5)} for row in expected] == written
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("6 of 24 rows by affinity in ")
    shown = [int(line.split()[0]) for line in printed[-6:]]
    order = sorted(range(24), key=lambda row: -selector.scores[row])
    assert shown == order[:3] + order[-3:]
    assert "<svg" in (folder / f"{output}.svg").read_text()


def test_an_existing_output_is_an_error_before_any_work(folder, capsys):
    (folder / "there").mkdir()
    command = ["select", "--model", "no-such-model", "--pool", "no.jsonl", "--output", f"{folder}/there"]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out.jsonl", "--plot", "scores.png"], "'scores.png' exists already; give another name"),
        (["--output", "out.svg", "--plot", "./out.svg"], "--plot 'out.svg' is where --output 'out.svg' is to be"),
        (["--output", "out", "--cache-dir", "out/cache"], "--cache-dir 'out/cache' is where --output 'out' is to be"),
    ],
)
def test_places_that_are_taken_are_told_before_any_work(options, message, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "scores.png").write_text("precious")
    monkeypatch.chdir(tmp_path)
    model = ["--model", f"{folder}/model", "--dtype", "float32"]
    assert main(["select", *model, "--pool", f"{folder}/pool.jsonl", "--scorer", "random", *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]
    assert (tmp_path / "scores.png").read_text() == "precious"


def test_conversations_into_a_csv_file_are_refused_before_a_model_is_loaded(folder, tmp_path, capsys):
    conversational(4).to_json(tmp_path / "chats.jsonl")
    command = ["select", "--model", "no-such-model", "--pool", f"{tmp_path}/chats.jsonl", "--scorer", "random"]
    assert main([*command, "--output", f"{tmp_path}/kept.csv"]) == 2
    assert "CSV cannot hold the column 'messages', which is nested" in capsys.readouterr().err
    assert not (tmp_path / "kept.csv").exists()


def test_bytes_into_a_file_of_text_are_refused_before_a_model_is_loaded(folder, tmp_path, capsys):
    pool = prompt_completion(4).add_column("thumb", [b"\xff"] * 4)
    pool.to_parquet(tmp_path / "pool.parquet")
    command = ["select", "--model", "no-such-model", "--pool", f"{tmp_path}/pool.parquet", "--scorer", "random"]
    assert main([*command, "--output", f"{tmp_path}/kept.jsonl"]) == 2
    assert "JSONL cannot hold the column 'thumb', which holds bytes" in capsys.readouterr().err
    assert not (tmp_path / "kept.jsonl").exists()
