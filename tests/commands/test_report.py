from p2d_peft.cli import main

from ..report.test_run_report import report


def test_a_run_is_printed(tmp_path, capsys):
    report().save(tmp_path / "p2d_report.json")
    for name in (tmp_path, tmp_path / "p2d_report.json"):
        assert main(["report", str(name)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("stage seconds") and "affinity" in printed


def test_a_folder_without_a_report_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"There is no '{tmp_path}/p2d_report.json'" in capsys.readouterr().err
