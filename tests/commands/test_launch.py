import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command

from p2d_peft.cli import main
from p2d_peft.commands import launch, sft
from p2d_peft.commands.launch import is_launched, launch_arguments
from p2d_peft.report import P2DReport

from ..test_docs import ROOT
from .test_sft import RECIPE


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Neither started by a launcher nor on a machine where accelerate was configured."""
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))


def test_with_nothing_to_launch_nothing_is_launched(monkeypatch, tmp_path):
    assert launch_arguments([], ["sft"]) is None
    monkeypatch.setattr(launch.torch.accelerator, "device_count", lambda: 2)
    assert launch_arguments([], ["sft"]) is not None
    monkeypatch.undo()
    (tmp_path / "default_config.yaml").touch()
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    assert launch_arguments([], ["sft"]) is not None


def test_the_launcher_gets_its_flags_and_the_processes_get_all():
    unknown = ["--accelerate_config", "fsdp2", "--num_processes", "2"]
    command = ["sft", "--learning_rate", "1e-3", *unknown]
    arguments, *_ = _validate_launch_command(launch_arguments(unknown, command))
    assert (arguments.training_script, arguments.training_script_args) == ("p2d_peft.cli", command)
    assert arguments.module and arguments.num_processes == 2
    assert arguments.use_fsdp and str(arguments.fsdp_version) == "2" and arguments.mixed_precision == "bf16"


@pytest.mark.parametrize("unknown", [["--learning_rte", "1e-3"], ["--quickly"]])
def test_what_nobody_knows_is_an_error(unknown):
    with pytest.raises(ValueError, match=f"Neither `p2d sft` nor `accelerate launch` knows {unknown[0]}"):
        launch_arguments(unknown, ["sft", *unknown])


def test_a_failed_process_ends_the_command_without_a_second_message(monkeypatch, capsys):
    def fail(arguments):
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(launch, "launch_command", fail)
    with pytest.raises(SystemExit) as error:
        launch.launch(launch_arguments(["--num_processes", "1"], ["sft"]))
    assert error.value.code == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("launcher", [None, "ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"])
def test_a_launched_process_trains_and_launches_no_more(launcher, monkeypatch, tmp_path):
    if launcher is not None:
        monkeypatch.setenv(launcher, "0")
    assert is_launched() == (launcher is not None)
    called = []
    monkeypatch.setattr(sft, "main", lambda *_: called.append("main"))
    monkeypatch.setattr(sft, "launch", lambda _: called.append("launch"))
    (tmp_path / "recipe.yaml").write_text("num_processes: 2\nlearning_rate: 1.0e-3\n")
    flags = ["--use_cpu", "--output_dir", str(tmp_path)]
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # a lone rank has no group to join
    monkeypatch.setattr(sft, "is_launched", lambda: launcher is not None)
    sft.run(["--config", f"{tmp_path}/recipe.yaml", *flags])
    assert called == (["launch"] if launcher is None else ["main"])


def test_the_processes_get_what_stands_before_the_command(monkeypatch):
    launched = []
    monkeypatch.setattr(sft, "launch", launched.append)
    assert main(["sft", "--num_processes", "2", "--use_cpu", "--bf16", "false", "--quiet"]) == 0
    assert main(["--debug", "sft", "--num_processes", "2", "--use_cpu", "--bf16", "false"]) == 0
    own = ["sft", "--num_processes", "2", "--use_cpu", "--bf16", "false"]
    assert [arguments.training_script_args for arguments in launched] == [["--quiet", *own], ["--debug", *own]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["p2d sft", "accelerate launch"])
def test_two_processes_train(how, folder, tmp_path):
    """What docs/many-gpus.md starts, on the CPU: for Accelerate's launcher, several GPUs are several processes."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=folder, output=tmp_path / "out"))
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = ["sft", "--config", f"{tmp_path}/recipe.yaml", "--max_steps", "1", "--report_to", "none"]
    if how == "p2d sft":
        command = ["-m", "p2d_peft.cli", *command, *launcher]
    else:
        command = ["-m", "accelerate.commands.launch", *launcher, "-m", "p2d_peft.cli", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    report = P2DReport.load(tmp_path / "out" / "p2d_report.json")
    assert report.processes == 2 and set(report.stage_seconds) == {"localize", "select", "train"}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
