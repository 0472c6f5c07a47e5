import json

import pytest
from trl import SFTConfig, TrlParser

from p2d_peft import P2DConfig

from .test_measured_run import FULL


def test_keeps_every_default_of_sft_config(tmp_path):
    ours, theirs = P2DConfig(str(tmp_path), bf16=False), SFTConfig(str(tmp_path), bf16=False)
    for name in theirs.__dataclass_fields__:
        if name != "logging_dir":
            assert str(getattr(ours, name)) == str(getattr(theirs, name)), name


def test_works_with_trl_parser_flags_yaml_and_help(tmp_path, capsys):
    parser = TrlParser((P2DConfig,))
    (args,) = parser.parse_args_and_config(
        ["--output_dir", str(tmp_path), "--bf16", "false", "--head_ratio", "0.2", "--heads_per_layer", "1"]
    )
    assert (args.head_ratio, args.heads_per_layer, args.scorer) == (0.2, 1, "affinity")
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nbf16: false\nscorer: icl\ndata_ratio: 0.3\n")
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml"), "--data_ratio", "0.4"])
    assert (args.scorer, args.data_ratio) == ("icl", 0.4)
    with pytest.raises(SystemExit):
        parser.parse_args_and_config(["--help"])
    assert "The paper takes 10 %." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_ratio", 0, r"`head_ratio` must be in \(0, 1\], got 0"),
        ("data_ratio", 1.5, r"`data_ratio` must be in \(0, 1\], got 1\.5"),
        ("train_last_layers", 2, r"`train_last_layers` must be in \(0, 1\], got 2"),
        ("score_first_layers", 0.0, r"`score_first_layers` must be in \(0, 1\], got 0\.0"),
        ("heads_per_layer", 0, "`heads_per_layer` must be at least 1, got 0"),
        ("heads_per_group", 0, "`heads_per_group` must be at least 1, got 0"),
        (
            "localize_method",
            "magic",
            r"`localize_method` must be one of 'proxy', 'taylor', .*'random', got 'magic'",
        ),
        ("scorer", "magic", "`scorer` must be one of .*'affinity'.*got 'magic'"),
        ("target_samples", 0, "`target_samples` must be at least 1, got 0"),
        ("reference_seconds", 0.0, r"`reference_seconds` must be positive, got 0\.0"),
        ("reference_report", "gone", "`reference_report`='gone' does not exist"),
        ("reference_steps", -1, "`reference_steps` must be at least 0, got -1"),
        ("report_samples", -1, "`report_samples` must be at least 0, got -1"),
    ],
)
def test_bad_fields_are_named(field, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        P2DConfig(str(tmp_path), bf16=False, **{field: value})


def test_the_reference_is_given_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"Give `reference_seconds` \(9\.0\) or `reference_report` \('run'\), not both"
    ):
        P2DConfig(str(tmp_path), bf16=False, reference_seconds=9.0, reference_report="run")


def test_paths_may_be_objects_and_arguments_stay_json(tmp_path):
    FULL.save(tmp_path / "p2d_report.json")
    args = P2DConfig(str(tmp_path), bf16=False, reference_report=tmp_path)
    assert json.loads(args.to_json_string())["reference_report"] == str(tmp_path)
