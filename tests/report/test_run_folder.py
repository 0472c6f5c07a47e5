import json

import pytest
import torch

from p2d_peft.heads import HeadScores
from p2d_peft.report.run_folder import Run

from .run_folders import write_run
from .test_run_report import report


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path)


def test_all_that_a_run_left(folder):
    run = Run.read(folder)
    assert run == Run.read(folder / "p2d_report.json") or run.report == Run.read(folder / "p2d_report.json").report
    assert len(run.heads) == 27 and run.scores.method == "proxy"
    assert run.selection.kept_rows == 122 and len(run.samples.best) == 10
    assert [chart.title for chart in run.curves][:2] == ["Loss", "Share of tokens predicted right"]
    assert run.weight_files == {"adapter_model.safetensors": 148_000, "lora/adapter_model.safetensors": 251_000}
    assert run.checkpoint == ("checkpoint-93", 297_000)


def test_a_report_alone_will_do(tmp_path):
    report(layer_heads=None).save(tmp_path / "p2d_report.json")
    run = Run.read(tmp_path)
    assert run.scores is run.selection is run.samples is run.checkpoint is None and run.curves == []


def test_without_a_log_of_its_own_the_last_checkpoint_has_it(folder):
    for number, loss in ((9, 1.0), (10, 2.0)):
        (folder / f"checkpoint-{number}").mkdir()
        state = {"log_history": [{"step": 1, "loss": loss}]}
        (folder / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "trainer_state.json").unlink()
    (folder / "checkpoint-93" / "optimizer.pt").unlink()
    (folder / "checkpoint-93").rmdir()
    (chart,) = Run.read(folder).curves
    assert chart.curves[0].points == [(1.0, 2.0)]


@pytest.mark.parametrize("method", [None, "random"])
def test_heads_that_were_given_or_drawn_have_no_scores_whatever_lies_there(method, folder):
    write_run(folder, localize_method=method)
    assert Run.read(folder).scores is None


def test_nothing_in_a_file_names_another_file(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.json"
    secret.write_text('{"format": "p2d_peft.SelectionRecord"}')
    # wherever a text stands; nothing is opened by it
    write_run(folder, text=f"../../{secret}", model=str(secret), arguments={"output_dir": str(secret.parent)})
    run = Run.read(folder)
    assert run.report.model == str(secret)
    assert all(name in ("adapter_model.safetensors", "lora/adapter_model.safetensors") for name in run.weight_files)


def damage(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("p2d_report.json", {"heads": {"0": [-1]}}, "`heads` is no set of heads"),
        ("p2d_report.json", {"heads": {"a/../b": [1]}}, "`heads` is no set of heads"),
        ("p2d_report.json", {"heads": {"0": [9]}}, "`layer_heads` has no such head"),
        ("p2d_report.json", {"stage_seconds": {"train": "<script>"}}, "must be float"),
        ("p2d_head_scores.json", {"values": [["a"]]}, "is damaged or no table of head scores"),
        ("p2d_head_scores.json", {"values": None}, "is damaged or no table of head scores"),
        ("p2d_selection.json", {"scores": {"edges": [1.0, 0.0], "kept": [1], "left_out": [1]}}, "ascending `edges`"),
        ("p2d_selection.json", {"scores": {"edges": [0.0, 1.0], "kept": [-1], "left_out": [1]}}, "at least 0"),
        ("_p2d_samples.json", {"best": [{"text": 1}]}, "is missing"),
    ],
)
def test_a_damaged_file_is_named(name, changes, message, folder):
    damage(folder, name, **changes)
    with pytest.raises(ValueError, match=rf"{name}'.*{message}"):
        Run.read(folder)


def test_scores_of_another_model_are_refused(folder):
    HeadScores(torch.ones(2, 2), "proxy").save(folder / "p2d_head_scores.json")
    with pytest.raises(ValueError, match=r"p2d_head_scores\.json' is not of this run"):
        Run.read(folder)


def test_a_log_that_is_none_is_told(folder):
    (folder / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"trainer_state\.json' is not the state of a trainer"):
        Run.read(folder)


@pytest.mark.parametrize("changes", [{"pool_rows": 1221}, {"kept_rows": 121}, {"scorer": "random"}], ids=str)
def test_data_of_a_later_run_are_left_out(changes, folder, caplog):
    damage(folder, "p2d_selection.json", **changes)
    run = Run.read(folder)
    assert run.selection is run.samples is None and run.heads and run.curves
    assert "p2d_selection.json' is not of the run that 'p2d_report.json' is of" in caplog.text
