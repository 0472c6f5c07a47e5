import huggingface_hub.utils
import pytest
from datasets.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

from p2d_peft import __version__
from p2d_peft.cli import main

from .tiny_data import prompt_completion
from .tiny_models import tiny_model, tiny_tokenizer


def test_errors_are_one_line_and_exit_code_two(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompt_completion().to_json(tmp_path / "pool.jsonl")
    command = ["select", "--model", f"{tmp_path}/model", "--pool", f"{tmp_path}/pool.jsonl"]
    command += ["--output", f"{tmp_path}/out"]
    capsys.readouterr()  # the bars of what is made here
    assert main(command) == 2  # no heads
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["p2d select: --scorer affinity needs --heads, what `p2d heads` wrote."]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="needs --heads"):
        main(["--debug", *command])


def test_an_unknown_argument_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["report", "run", "--colour", "blue"])
    assert error.value.code == 2 and "unrecognized arguments: --colour blue" in capsys.readouterr().err


def test_version_and_help_name_what_there_is(capsys):
    for flag, expected in (("--version", [__version__]), ("--help", ["sft", "heads", "select", "export", "report"])):
        with pytest.raises(SystemExit) as error:
            main([flag])
        printed = capsys.readouterr().out
        assert error.value.code == 0 and all(word in printed for word in expected)
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--heads_file", "--data_ratio", "--learning_rate", "--load_in_4bit"))


@pytest.fixture
def localizing(tmp_path):
    """The arguments of a command that shows bars: of `datasets`, as it reads a file, and its own."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompt_completion(4).to_json(tmp_path / "target.jsonl")
    files = ["--data", f"{tmp_path}/target.jsonl", "--output", f"{tmp_path}/heads.json"]
    return ["heads", "--model", f"{tmp_path}/model", "--dtype", "float32", "--method", "gate", *files]


@pytest.fixture
def bars(monkeypatch):
    """Bars are on, as they are where no variable switches them off."""
    monkeypatch.setattr(huggingface_hub.utils, "are_progress_bars_disabled", lambda: False)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    enable_progress_bars()  # which benchmarks switch off


def test_bars_name_their_stage(localizing, bars, capsys):
    assert main(localizing) == 0
    printed = capsys.readouterr()
    assert "Localize (gate)" in printed.err and "Warning" not in printed.err
    assert printed.out.splitlines()[-1].startswith("written to ")


def test_the_hub_variable_switches_all_bars_off(localizing, bars, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.utils, "are_progress_bars_disabled", lambda: True)
    assert main(localizing) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "written to " in printed.out
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


def test_quiet_is_quiet_but_for_errors(localizing, bars, tmp_path, capsys):
    for arguments in (["--quiet", *localizing], [*localizing, "--quiet"]):
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", "") and (tmp_path / "heads.json").is_file()
    assert main(["--quiet", "report", f"{tmp_path}/model"]) == 2
    assert capsys.readouterr().err.startswith("p2d report: There is no ")
