import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.cli import main

from ..tiny_models import random_batch, tiny_tokenizer


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run's folder: an adapter that was trained, its tokenizer, and a checkpoint."""
    run = tmp_path_factory.mktemp("run")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(base, HeadSparseConfig(heads=HeadSet([(0, 1), (2, 0), (2, 3)]), task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(run)
    model.save_pretrained(run / "checkpoint-2")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "the run's own"
    tokenizer.save_pretrained(run)
    return run


def logits(model):
    batch = random_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


@pytest.fixture(scope="module")
def expected(folder, run):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), run))


def test_lora_computes_what_the_adapter_computes(folder, run, expected, tmp_path, capsys):
    assert main(["export", str(run), "--output", f"{tmp_path}/lora"]) == 0
    assert "LoRA of rank 24, nothing lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == "the run's own"
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_merged_computes_what_the_adapter_computes(run, expected, tmp_path):
    assert main(["export", str(run), "--output", f"{tmp_path}/merged", "--format", "merged"]) == 0
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "the run's own"


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_the_dtype_is_that_of_the_file(form, run, tmp_path):
    assert main(["export", str(run), "--output", f"{tmp_path}/out", "--format", form, "--dtype", "bfloat16"]) == 0
    name = "adapter_model.safetensors" if form == "lora" else "model.safetensors"
    assert {weight.dtype for weight in load_file(tmp_path / "out" / name).values()} == {torch.bfloat16}


def test_the_rank_can_be_cut_down(run, tmp_path, capsys):
    assert main(["export", str(run), "--output", f"{tmp_path}/lora", "--max-rank", "4"]) == 0
    assert "LoRA of rank 4, a relative error of " in capsys.readouterr().out


def test_a_run_that_did_not_end_gives_its_last_checkpoint(run, tmp_path):
    (tmp_path / "run").mkdir()
    (run / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-2")
    assert main(["export", f"{tmp_path}/run", "--output", f"{tmp_path}/lora"]) == 0
    # the adapter has no tokenizer beside it, and a LoRA needs none; a merged model does, and gets the base's
    assert not (tmp_path / "lora" / "tokenizer.json").exists()
    assert main(["export", f"{tmp_path}/run", "--output", f"{tmp_path}/merged", "--format", "merged"]) == 0
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_refused_before_any_work(folder, run, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    capsys.readouterr()
    for arguments, message in [
        ([str(run), "--output", f"{tmp_path}/lora"], "lora' exists already"),
        ([f"{folder}/model", "--output", f"{tmp_path}/out"], "has no adapter_config.json, nor has a checkpoint"),
        ([f"{tmp_path}/lora", "--output", f"{tmp_path}/out"], "is no HeadSparse adapter but LORA; merge it"),
        (
            [str(run), "--output", f"{tmp_path}/out", "--format", "merged", "--max-rank", "4"],
            "`max_rank`=4 is for `format`='lora'",
        ),
    ]:
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
