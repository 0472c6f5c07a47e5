import json
import re
from types import SimpleNamespace

import pytest
from datasets import IterableDataset
from peft import PeftConfig

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft import trainer as trainer_module
from p2d_peft.cli import main
from p2d_peft.commands import launch, sft
from p2d_peft.commands.common import read_heads
from p2d_peft.efficiency import StageCosts
from p2d_peft.report import P2DReport
from p2d_peft.trainer.state import P2DState

from ..tiny_data import prompt_completion


RECIPE = """
model_name_or_path: {folder}/model
dataset_name: {folder}/pool.jsonl
target_dataset_name: {folder}/target.parquet
head_ratio: 0.25
data_ratio: 0.5
reference_steps: 1
learning_rate: 1e-2
max_steps: 2
use_cpu: true
bf16: false
disable_tqdm: true
output_dir: {output}
"""


@pytest.fixture
def recipe(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, output=tmp_path / "out"))
    return str(path)


@pytest.fixture
def given(monkeypatch):
    """Stands in for the trainer: holds what it was made with and the calls it got."""

    class Stub:
        kwargs, calls, report, hub_model_id = {}, [], None, "user/name"

        def __init__(self, **kwargs):
            Stub.kwargs, Stub.calls = kwargs, []
            self.accelerator = self

        def train(self, **kwargs):
            Stub.calls.append(("train", (), kwargs))
            return SimpleNamespace(metrics={})

        def __getattr__(self, name):
            return lambda *args, **kwargs: Stub.calls.append((name, args, kwargs))

    monkeypatch.setattr(trainer_module, "P2DTrainer", Stub)
    return Stub


def test_a_recipe_runs_and_flags_override_it(recipe, tmp_path, capsys):
    assert main(["sft", "--config", recipe, "--data_ratio", "0.25"]) == 0
    report = P2DReport.load(tmp_path / "out" / "p2d_report.json")
    assert (report.selected_rows, report.pool_rows, len(report.heads)) == (6, 24, len(set(report.heads)))
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, HeadSparseConfig)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    printed = capsys.readouterr().out
    assert re.search(r"^\*+ train metrics \*+$", printed, re.MULTILINE)
    assert re.search(r"^  train_p2d_selected_rows +=  +6$", printed, re.MULTILINE)
    assert f"saved to {tmp_path}/out; `p2d report {tmp_path}/out` tells what was chosen" in printed


def test_use_peft_trains_lora_on_the_selected_rows(recipe, tmp_path):
    assert (
        main(["sft", "--config", recipe, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"])
        == 0
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], sorted(config["target_modules"])) == ("LORA", 2, ["q_proj", "v_proj"])
    report = P2DReport.load(tmp_path / "out" / "p2d_report.json")
    assert (report.selected_rows, report.localize_method) == (12, "random")


def test_heads_may_be_given(recipe, tmp_path):
    HeadSet([(0, 1), (2, 2)]).save(tmp_path / "heads.json")
    HeadSet([(0, 1), (2, 2)]).save_pretrained(tmp_path / "adapter")
    assert read_heads(str(tmp_path / "adapter")) == read_heads(str(tmp_path / "heads.json"))
    assert main(["sft", "--config", recipe, "--heads_file", f"{tmp_path}/heads.json"]) == 0
    report = P2DReport.load(tmp_path / "out" / "p2d_report.json")
    assert (report.heads, report.localize_method) == ({"0": [1], "2": [2]}, None)


def test_without_p2d_it_is_trl_s_own(recipe, tmp_path):
    assert main(["sft", "--config", recipe, "--no_p2d"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    report = P2DReport.load(tmp_path / "out" / "p2d_report.json")  # the reference of runs with it
    assert set(report.stage_seconds) == {"train"} and report.scorer is None


def test_a_mixture_is_the_pool_and_can_be_split(recipe, folder, given, tmp_path):
    mixture = [{"path": "json", "data_files": f"{folder}/pool.jsonl", "fraction": fraction} for fraction in (0.5, 0.5)]
    with open(recipe, "a") as file:
        file.write(f"datasets: {json.dumps(mixture)}\ntest_split_size: 0.25\neval_strategy: epoch\n")
    assert main(["sft", "--config", recipe]) == 0
    assert (len(given.kwargs["train_dataset"]), len(given.kwargs["eval_dataset"])) == (36, 12)


def test_what_a_trainer_takes_is_passed_on(recipe, folder, given, tmp_path):
    (tmp_path / "data").mkdir()
    for split, n in (("train", 8), ("test", 4)):
        prompt_completion(n).to_json(tmp_path / "data" / f"{split}.jsonl")
    flags = ["--dataset_name", f"{tmp_path}/data", "--dataset_streaming", "--eval_strategy", "steps"]
    flags += ["--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16", "--attn_implementation", "eager"]
    flags += ["--push_to_hub"]
    assert main(["sft", "--config", recipe, *flags]) == 0
    kwargs = given.kwargs
    assert kwargs["model"] == f"{folder}/model" and kwargs["heads"] is None and kwargs["peft_config"] is None
    assert kwargs["args"].model_init_kwargs == {
        "revision": "main",
        "attn_implementation": "eager",
        "dtype": "bfloat16",
    }
    quantization = kwargs["quantization_config"]
    assert (quantization.load_in_4bit, quantization.bnb_4bit_use_double_quant) == (True, True)
    assert isinstance(kwargs["train_dataset"], IterableDataset)
    assert [len(list(kwargs[name])) for name in ("train_dataset", "eval_dataset")] == [8, 4]
    assert len(kwargs["target_dataset"]) == 6
    calls = [(name, kwargs) for name, _, kwargs in given.calls if name != "print"]
    assert calls == [
        ("train", {"resume_from_checkpoint": None}),
        ("save_model", {}),
        ("log_metrics", {}),
        ("push_to_hub", {"dataset_name": None}),  # a local folder, which nobody finds on the Hub
        ("free_memory", {}),  # and with it DDP, before the process group
        ("end_training", {}),
    ]


@pytest.mark.parametrize(
    ("name", "named"),
    [("trl-lib/Capybara", "trl-lib/Capybara"), ("saved", None), ("pool.jsonl", None), ("moved-away.parquet", None)],
)
def test_the_card_names_what_is_on_the_hub(name, named, recipe, given, tmp_path, monkeypatch):
    prompt_completion(4).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "read_dataset", lambda *_: prompt_completion(4))
    assert main(["sft", "--config", recipe, "--push_to_hub", "--dataset_name", name]) == 0
    assert ("push_to_hub", (), {"dataset_name": named}) in given.calls


def test_the_card_of_a_mixture_names_no_other_dataset(recipe, folder, given):
    with open(recipe, "a") as file:
        file.write(f"datasets: [{{path: json, data_files: {folder}/pool.jsonl}}]\n")
    assert main(["sft", "--config", recipe, "--push_to_hub", "--dataset_name", "trl-lib/Capybara"]) == 0
    assert ("push_to_hub", (), {"dataset_name": None}) in given.calls


def test_a_folder_of_one_dataset_has_no_rows_to_evaluate_on(recipe, given, tmp_path, capsys):
    prompt_completion(8).save_to_disk(tmp_path / "saved")
    flags = ["--dataset_name", f"{tmp_path}/saved", "--eval_strategy", "steps"]
    assert main(["sft", "--config", recipe, *flags]) == 2
    assert "saved' has no splits. Give a folder with a train and a test split" in capsys.readouterr().err
    assert not given.kwargs
    assert main(["sft", "--config", recipe, *flags[:2]]) == 0
    assert len(given.kwargs["train_dataset"]) == 8 and given.kwargs["eval_dataset"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_train_split", "nonexistent[:3]"], "pool.jsonl' has no split 'nonexistent[:3]'"),
        (["--dataset_config", "zzz"], "pool.jsonl' has no configurations, got 'zzz'"),
        (["--target_dataset_split", "test"], "target.parquet' has no split 'test'"),
        (["--target_dataset_config", "zzz"], "target.parquet' has no configurations, got 'zzz'"),
    ],
)
def test_what_a_file_lacks_is_not_passed_over(flags, message, recipe, given, capsys):
    assert main(["sft", "--config", recipe, *flags]) == 2
    assert message in capsys.readouterr().err and not given.kwargs


@pytest.mark.parametrize(
    ("line", "flags", "passed_on"),
    [
        ("", ["--resume_from_checkpoint"], True),
        ("", ["--resume_from_checkpoint", "true"], True),
        ("", ["--resume_from_checkpoint", "True"], True),
        ("", ["--resume_from_checkpoint", "out/checkpoint-1"], "out/checkpoint-1"),
        ("resume_from_checkpoint: true", [], True),
        ("resume_from_checkpoint: 'true'", [], True),
        ("resume_from_checkpoint: true", ["--resume_from_checkpoint", "false"], False),
    ],
)
def test_training_goes_on_from_the_last_checkpoint_or_a_named_one(
    line, flags, passed_on, recipe, given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    P2DState(None, None).save("out/checkpoint-1", StageCosts())
    with open(recipe, "a") as file:
        file.write(line)
    assert main(["sft", *flags, "--config", recipe]) == 0
    assert given.calls[0] == ("train", (), {"resume_from_checkpoint": passed_on})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no"], "`resume_from_checkpoint`='no' has no p2d_state.json"),
        ([], "out'. Give the folder of one, or leave it out to start anew"),
        (["--no_p2d"], "out'. Give the folder of one, or leave it out to start anew"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_before_any_work(flags, message, recipe, given, capsys):
    assert main(["sft", "--config", recipe, "--resume_from_checkpoint", *flags]) == 2
    assert message in capsys.readouterr().err and not given.kwargs


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("dataset_name: null", "There is no training data: give `dataset_name`"),
        ("eval_strategy: epoch", r"pool.jsonl' has no splits. Give a folder with a train and a test split"),
        ("eval_strategy: epoch\ndatasets: [{path: json, data_files: FOLDER/pool.jsonl}]", "give `test_split_size`"),
        ("heads_ratio: 0.5", "Neither `p2d sft` nor `accelerate launch` knows --heads_ratio"),
        ("heads_file: no.json", "There is no file 'no.json' to read heads from; `p2d heads` writes one"),
        ("data_ratio: 2.0", "`data_ratio` must be in (0, 1], got 2.0"),
    ],
)
def test_mistakes_are_told_before_any_work(lines, message, recipe, folder, given, capsys):
    with open(recipe, "a") as file:
        file.write(lines.replace("FOLDER", str(folder)))
    capsys.readouterr()
    assert main(["sft", "--config", recipe]) == 2
    error = capsys.readouterr().err
    assert message in error and not given.kwargs


def test_quiet_reaches_the_trainer(recipe, given, capsys):
    assert main(["sft", "--config", recipe, "--disable_tqdm", "false", "--quiet"]) == 0
    assert given.kwargs["args"].disable_tqdm and capsys.readouterr().out == ""


def test_a_missing_bitsandbytes_is_named(recipe, monkeypatch, capsys):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    assert main(["sft", "--config", recipe, "--load_in_4bit"]) == 2
    assert "requires bitsandbytes: `pip install -U bitsandbytes" in capsys.readouterr().err
