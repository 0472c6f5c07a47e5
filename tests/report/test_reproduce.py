import shlex

from p2d_peft.commands import sft
from p2d_peft.report.reproduce import reproduction

from .run_folders import HOSTILE
from .test_run_report import report


def words(command):
    return shlex.split(command.replace("\\\n", " "))


def test_the_commands_are_those_of_the_command_line():
    install, train = reproduction(report(versions={"python": "3.11.2", "torch": "2.13.0+cpu", "trl": "1.16.0"}, arguments={
        "learning_rate": 0.002, "bf16": False, "optim": "sgd", "data_ratio": 0.2, "warmup_steps": 3,
    }))  # fmt: skip
    assert words(install) == ["pip", "install", "torch==2.13.0", "trl==1.16.0"]
    assert words(train)[:2] == ["p2d", "sft"]
    script, args, model, _ = sft.make_parser().parse_args_and_config([*words(train)[2:], "--use_cpu"])
    assert (args.learning_rate, args.bf16, args.optim, args.data_ratio, args.seed) == (0.002, False, "sgd", 0.2, 42)
    assert (script.dataset_name, script.target_dataset_name, model.model_name_or_path) == (
        "POOL",
        "TARGET",
        "org/name",
    )


def test_given_heads_are_given_again_and_a_run_without_p2d_has_no_target():
    assert "--heads_file RUN/p2d_heads.json" in reproduction(report(localize_method=None))[1]
    train = reproduction(report(arguments={"p2d": False}, heads=None, localize_method=None))[1]
    assert "--p2d false" in train and "TARGET" not in train and "heads_file" not in train


def test_a_report_adds_no_word_to_a_command():
    nasty = f"x; rm -rf ~ $(id) `id` && {HOSTILE}\n"
    install, train = reproduction(
        report(
            model=nasty,
            arguments={"optim": nasty, nasty: 1, "--flag": 1, "a b": 2},
            versions={nasty: "1", "torch": nasty, "peft": "-r http://evil", "trl": "1"},
        )
    )
    assert words(install) == ["pip", "install", "trl==1"]
    said = words(train)
    assert said[:4] == ["p2d", "sft", "--model_name_or_path", nasty.replace("\\\n", " ")]
    assert [word for word in said if word.startswith("--")] == [
        "--model_name_or_path", "--dataset_name", "--target_dataset_name", "--seed", "--optim", "--output_dir",
    ]  # fmt: skip
    assert len(said) == 14


def test_another_adapter_has_to_be_given():
    train = reproduction(report(arguments={"peft_type": "LORA", "eos_token": "</s>", "learning_rate": 0.002}))[1]
    comment, command = train.split("\n", 1)
    assert comment.startswith("# The adapter was LORA") and "--lora_ options" in comment
    _, args, model, _ = sft.make_parser().parse_args_and_config([*words(command)[2:], "--lora_r", "4", "--use_cpu"])
    assert (model.use_peft, model.lora_r, args.eos_token) == (True, 4, "</s>") and "peft_type" not in command
    other = reproduction(report(arguments={"peft_type": "IA3"}))[1]
    assert "as peft_config" in other.splitlines()[0] and "use_peft" not in other


def test_a_kind_of_adapter_adds_no_command():
    for nasty in ("X\nrm -rf ~", "X; id", ""):
        train = reproduction(report(arguments={"peft_type": nasty}))[1]
        assert train == reproduction(report(arguments={}))[1]
