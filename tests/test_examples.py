"""The examples as a user runs them, on a tiny model and small data; their recipes and configurations as what they are."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from p2d_peft import HeadSet
from p2d_peft.commands.sft import make_parser

from .quantized_models import SIZES
from .tiny_data import conversational, prompt_completion
from .tiny_models import tiny_model, tiny_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    tiny_model(**SIZES).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, made in (("rows", prompt_completion), ("chats", conversational)):
        made(40).to_json(folder / f"{name}.jsonl")
        made(6, seed=1).to_json(folder / f"{name}-target.jsonl")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(name, *flags, data="rows"):
        monkeypatch.chdir(folder)
        command = ["--model", "model", "--pool", f"{data}.jsonl", "--target", f"{data}-target.jsonl"]
        monkeypatch.setattr(sys, "argv", [name, *command, "--output-dir", name.removesuffix(".py"), *flags])
        capsys.readouterr()
        made = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return made["trainer"], capsys.readouterr().out

    return run


def assert_saved(folder, method):
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == method
    weights = load_file(folder / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_A" not in name)


def test_plain_sft(run, folder):
    trainer, printed = run("plain_sft.py")
    assert len(trainer.train_dataset) == 4 and "selected rows" in printed
    assert_saved(folder / "plain_sft", "HEAD_SPARSE")


def test_chat_assistant_only(run, folder):
    trainer, printed = run("chat_assistant_only.py", data="chats")
    asked, answered = conversational(40)["messages"][trainer._p2d_state.rows[0]]
    learned = printed.split("this is learned:")[1]
    assert answered["content"].strip() in learned and asked["content"] not in learned
    assert_saved(folder / "chat_assistant_only", "HEAD_SPARSE")


def test_own_heads(run, folder):
    trainer, _ = run("own_heads.py")
    assert trainer.heads == HeadSet([(1, 0), (2, 0)])
    assert {"q_proj", "o_proj"} == {
        name.split(".")[-4] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    HeadSet([(0, 1)]).save(folder / "heads.json")
    assert run("own_heads.py", "--heads", "heads.json")[0].heads == HeadSet([(0, 1)])
    assert_saved(folder / "own_heads", "HEAD_SPARSE")


def test_select_only(run, folder):
    trainer, printed = run("select_only.py")
    assert printed.startswith("4 of 40 rows by HeadSet(") and len(trainer.train_dataset) == 4
    assert_saved(folder / "select_only", "LORA")


def test_qlora_4bit(run, folder):
    pytest.importorskip("bitsandbytes")
    trainer, printed = run("qlora_4bit.py")
    assert trainer.model.get_base_model().is_loaded_in_4bit and "weights of 1 heads" in printed
    assert_saved(folder / "qlora_4bit", "HEAD_SPARSE")


def test_streaming_pool(run, folder):
    _, printed = run("streaming_pool.py", "--rows", "30", "--steps", "2")
    assert "2 of 30 rows of the stream" in printed
    assert_saved(folder / "streaming_pool", "HEAD_SPARSE")


@pytest.mark.slow
def test_multi_gpu(folder, tmp_path):
    """The script, accelerate's launcher and scripts/p2d_sft.py; one process on the CPU in the place of several GPUs."""
    (tmp_path / "cpu.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n")
    flags = ["--model_name_or_path", f"{folder}/model", "--dataset_name", f"{folder}/rows.jsonl"]
    flags += [
        "--target_dataset_name",
        f"{folder}/rows-target.jsonl",
        "--target_dataset_split",
        "train",
    ]  # the recipe's: test
    flags += ["--output_dir", f"{tmp_path}/out"]
    flags += ["--max_steps", "1", "--reference_steps", "0", "--use_cpu", "--bf16", "false"]
    command = ["bash", str(EXAMPLES / "multi_gpu.sh"), f"{tmp_path}/cpu.yaml", *flags]
    root = str(EXAMPLES.parent)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert_saved(tmp_path / "out", "HEAD_SPARSE")


@pytest.mark.parametrize("recipe", sorted((EXAMPLES / "recipes").iterdir()), ids=lambda path: path.stem)
def test_recipes_hold_only_what_p2d_sft_knows(recipe, tmp_path):
    flags = ["--config", str(recipe), "--use_cpu", "--output_dir", str(tmp_path)]
    script_args, training_args, _, dataset_args = make_parser().parse_args_and_config(flags)
    assert script_args.target_dataset_name and training_args.p2d
    assert script_args.dataset_name or dataset_args.datasets


def test_configurations_are_accelerate_s():
    configs = {
        path.stem: load_config_from_file(str(path)) for path in (EXAMPLES / "accelerate_configs").glob("*.yaml")
    }
    kinds = {name: config.distributed_type for name, config in configs.items()}
    assert kinds == {
        "multi_gpu": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "zero2": DistributedType.DEEPSPEED,
        "zero3": DistributedType.DEEPSPEED,
    }
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert [configs[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")] == [2, 3]


class TestDropIn:
    """Scripts of others, in which the import was changed."""

    @pytest.fixture
    def script(self, folder, monkeypatch, tmp_path):
        def script(name, *flags):
            monkeypatch.chdir(tmp_path)
            monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
            return runpy.run_path(str(EXAMPLES / "drop_in" / name), run_name="__main__")["trainer"]

        return script

    def test_script(self, script, folder, tmp_path):
        flags = [
            "--use_peft",
            "--lora_r",
            "4",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
            "--eval_strategy",
            "epoch",
        ]
        flags += ["--bf16", "false", "--report_to", "none", "--output_dir", "sft"]
        data = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "chats.jsonl"]
        trainer = script("sft_script.py", *data, *flags)
        assert (trainer.report.pool_rows, trainer.report.selected_rows) == (36, 4)
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        assert_saved(tmp_path / "sft", "LORA")

    def test_notebook(self, script, folder, tmp_path):
        trainer = script("notebook.py", folder / "model", folder / "chats.jsonl", "<|assistant|>")
        assert len(trainer.train_dataset) == 4 and trainer.state.global_step == 4
        assert all(row["labels"][0] == -100 != row["labels"][-1] for row in trainer.train_dataset)
        assert_saved(tmp_path / "lora_model", "LORA")

    def test_qlora(self, script, folder, tmp_path):
        pytest.importorskip("bitsandbytes")
        trainer = script("qlora.py", folder / "model", folder / "chats.jsonl")
        assert trainer.report.localize_method == "random" and len(trainer.train_dataset) == 4
        assert_saved(tmp_path / "qlora", "LORA")
        assert (tmp_path / "qlora-merged" / "model.safetensors").exists()
