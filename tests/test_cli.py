import pytest

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
    assert main(command) == 2  # no heads
    errors = capsys.readouterr().err.splitlines()  # behind what a progress bar writes
    assert errors[-1].startswith("p2d select: `scorer`='affinity' needs `heads`")
    assert not any("Traceback" in line for line in errors)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="needs `heads`"):
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
