import pytest

from p2d_peft.cli import main

from ..report.run_folders import write_run
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


def test_a_page_is_written_in_place_of_printing(tmp_path, capsys):
    write_run(tmp_path)
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/new/page.html\n"
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_two_runs_are_compared(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, seed=seed)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "of 27 here and 27 in the other run" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "c.html")]) == 0
    assert "Beside another run" in (tmp_path / "c.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"), [("p2d_report.json", "must end in .html"), ("page", "must end in .html")]
)
def test_a_page_may_not_take_the_place_of_another_file(name, message, tmp_path, capsys):
    write_run(tmp_path)
    before = (tmp_path / "p2d_report.json").read_bytes()
    assert main(["report", str(tmp_path), "--html", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err and (tmp_path / "p2d_report.json").read_bytes() == before


def test_a_report_that_comes_from_anyone_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "p2d_report.json").write_text('{"format": "p2d_peft.P2DReport", "schema": 3, "seed": "<script>"}')
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "is damaged" in said and said.count("\n") == 1 and not (tmp_path / "page.html").exists()
