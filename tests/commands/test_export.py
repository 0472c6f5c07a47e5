import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
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


def named_run(folder, run, names=("mine",)):
    """A run whose adapters have names: PEFT saves each into a folder of its own, and the tokenizer is around them."""
    config = HeadSparseConfig(heads=HeadSet([(0, 1)]), task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.save_pretrained(run)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "the run's own"
    tokenizer.save_pretrained(run)


@pytest.mark.parametrize("where", ["", "checkpoint-3"])
@pytest.mark.parametrize("form", ["lora", "merged"])
def test_an_adapter_that_has_a_name_is_found(where, form, folder, run, tmp_path):
    named_run(folder, tmp_path / "run" / where)
    shutil.copytree(run, tmp_path / "run" / where / "lora")  # what is none of the run's own adapters
    assert main(["export", f"{tmp_path}/run", "--output", f"{tmp_path}/out", "--format", form]) == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "run" / where / "mine"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model" if form == "lora" else tmp_path / "out")
    found = PeftModel.from_pretrained(base, tmp_path / "out") if form == "lora" else base
    torch.testing.assert_close(logits(found), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "the run's own"


def test_of_several_adapters_one_is_to_be_named(folder, tmp_path, capsys):
    named_run(folder, tmp_path / "run", ("mine", "yours"))
    assert main(["export", f"{tmp_path}/run", "--output", f"{tmp_path}/out"]) == 2
    said = capsys.readouterr().err
    assert f"run' has the adapters mine, yours; give the folder of one, such as '{tmp_path}/run/mine'" in said
    assert main(["export", f"{tmp_path}/run/yours", "--output", f"{tmp_path}/out"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "the run's own"


@pytest.mark.parametrize("name", [None, "mine"])
def test_of_a_run_on_the_hub_no_more_is_fetched_than_is_needed(name, folder, run, tmp_path, monkeypatch):
    """`snapshot_download` is stood in for by one that copies what the patterns let through, as the Hub's client does."""
    named_run(folder, tmp_path / "hub") if name else shutil.copytree(run, tmp_path / "hub")
    for other in ("checkpoint-2", "last-checkpoint", "lora"):
        shutil.copytree(run, tmp_path / "hub" / other, dirs_exist_ok=True)

    def fetch(repo_id, **patterns):
        files = [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert main(["export", "user/run", "--output", f"{tmp_path}/out"]) == 0
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ([name] if name else [])


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
