"""A folder with a tiny model, a pool, a target, and heads that `p2d heads` found."""

import pytest

from p2d_peft import HeadSet
from p2d_peft.cli import main

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    prompt_completion().to_json(folder / "pool.jsonl")
    prompt_completion(6, seed=1).to_parquet(folder / "target.parquet")
    return folder


@pytest.fixture(scope="package")
def heads(folder):
    model = ["--model", f"{folder}/model", "--dtype", "float32"]
    files = ["--output", f"{folder}/heads.json", "--scores", f"{folder}/scores.json", "--plot", f"{folder}/heads.png"]
    options = ["--method", "taylor", "--samples", "4", "--ratio", "0.3", "--per-group", "1"]
    assert main(["heads", *model, "--data", f"{folder}/target.parquet", *options, *files]) == 0
    return HeadSet.load(folder / "heads.json")
