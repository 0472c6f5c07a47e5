import dataclasses

import pytest
from peft import PeftModel

from p2d_peft import HeadSet, HeadSparseConfig, P2DConfig
from p2d_peft.trainer.resuming import choosing_arguments

from .test_measured_run import FULL
from .test_p2d_trainer import trainer


SAVING = {"save_strategy": "steps", "save_steps": 3, "localize_method": "random", "reference_steps": 0}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run = trainer(folder, changes=SAVING)
    run.train()
    return run, str(folder / "checkpoint-3")


def test_every_argument_bears_on_the_choice_or_does_not():
    names = choosing_arguments(P2DConfig(bf16=False, report_to="none")).keys()
    others = {"p2d", "reference_seconds", "reference_report", "reference_steps", "report_samples"}
    own = {field.name for field in dataclasses.fields(P2DConfig)} - {
        field.name for field in dataclasses.fields(P2DConfig.__mro__[1])
    }
    assert own == names | others and "data_ratio" in names


@pytest.mark.parametrize("where", ["heads", "peft_config"])
def test_other_heads_are_refused(where, killed, tmp_path):
    run, checkpoint = killed
    other = HeadSet([(0, 0)])
    given = {"heads": other} if where == "heads" else {"peft_config": HeadSparseConfig(heads=other)}
    resumed = trainer(tmp_path, changes=SAVING, **given)
    with pytest.raises(ValueError, match=r"was given the heads .*\[0\].* but `resume_from_checkpoint`=.* has trained"):
        resumed.train(resume_from_checkpoint=checkpoint)
    assert not isinstance(resumed.model, PeftModel)
    same = trainer(tmp_path, changes=SAVING, heads=run.heads)
    same.train(resume_from_checkpoint=checkpoint)
    assert same.heads == run.heads


def test_of_other_arguments_the_report_tells_those_of_the_choice(killed, tmp_path, caplog):
    run, checkpoint = killed
    resumed = trainer(tmp_path, changes={**SAVING, "data_ratio": 0.2, "scorer": "random", "learning_rate": 1e-3})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert "which do nothing: `data_ratio`=0.2 (it was 0.5), `scorer`='random' (it was 'affinity')" in caplog.text
    assert resumed.report.selected_rows == 16
    assert resumed.report.arguments == {**run.report.arguments, "learning_rate": 1e-3}
    caplog.clear()
    trainer(tmp_path, changes=SAVING).train(resume_from_checkpoint=checkpoint)
    assert "other arguments" not in caplog.text


def test_a_reference_that_was_measured_in_the_meantime_counts(killed, tmp_path):
    run, checkpoint = killed
    assert run.report.aer is None
    resumed = trainer(tmp_path / "resumed", changes={**SAVING, "reference_seconds": 1000.0})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert (resumed.report.reference_source, resumed.report.reference_seconds) == ("given", 1000)
    FULL.save(tmp_path / "p2d_report.json")
    other = trainer(tmp_path / "other", changes={**SAVING, "reference_report": str(tmp_path)})
    with pytest.raises(ValueError, match="is of a run on 100 rows, but `train_dataset` has 32"):
        other.train(resume_from_checkpoint=checkpoint)
    assert not isinstance(other.model, PeftModel)
